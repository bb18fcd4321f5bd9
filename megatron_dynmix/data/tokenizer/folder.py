"""Hugging Face tokenizer folders, read as they are.

`tokenizer.json` alone says how text becomes tokens. transformers 5 builds some tokenizers anew from their
class and takes little but the vocabulary from that file, and its tokenizers import torch; so it is asked only
for what no file of the folder says.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from megatron_dynmix.errors import InputError

_DOWNLOADED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_NAMELESS = (None, "PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")
"""Tokenizer classes that bring no special tokens of their own."""
_USUAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


class TokenizerFiles(NamedTuple):
    """What a folder says: the tokenizer, its special tokens by name (``eos_token``), and its chat template.

    A folder with several templates has them by name.
    """

    backend: Backend
    names: dict[str, str]
    chat_template: str | dict[str, str] | None


def read_folder(name: str, source: str, trust_remote_code: bool, *, local: bool) -> TokenizerFiles:
    """Read a folder, or (unless ``local``) one of the hub; what is damaged or missing is an InputError."""
    try:
        folder = Path(source) if local else _downloaded(source, trust_remote_code)
        config = _read_json(folder / "tokenizer_config.json")
        runs_code = trust_remote_code and "AutoTokenizer" in (config.get("auto_map") or ())
        if runs_code or not (folder / "tokenizer.json").is_file():
            return _converted(name, folder, trust_remote_code)
        return _read(folder, config)
    except InputError:
        raise
    except Exception as error:  # the libraries raise bare Exception for a damaged tokenizer.json
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"tokenizer {name}: cannot be loaded ({reason}); the folder needs a Hugging Face tokenizer.json "
            "and tokenizer_config.json"
        ) from error


def of_transformers(hf_tokenizer: Any) -> TokenizerFiles:
    """Return what a fast tokenizer of transformers says; its backend is copied."""
    backend = Backend.from_str(hf_tokenizer.backend_tokenizer.to_str())
    names = {name: str(token) for name, token in hf_tokenizer.special_tokens_map.items()}
    return TokenizerFiles(backend, names, hf_tokenizer.chat_template)


def _downloaded(repository: str, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*_DOWNLOADED, *(["*.py"] if trust_remote_code else [])]
    return Path(snapshot_download(repository, allow_patterns=patterns))


def _converted(name: str, folder: Path, trust_remote_code: bool) -> TokenizerFiles:
    """Have transformers make a fast tokenizer of older files, or of code that comes with them."""
    from transformers import AutoTokenizer

    hf_tokenizer = AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=trust_remote_code
    )
    if not getattr(hf_tokenizer, "is_fast", False):
        raise InputError(
            f"tokenizer {name}: a slow (pure Python) tokenizer, which gives no character offsets for loss "
            "masks; convert it so that the folder holds a tokenizer.json"
        )
    return of_transformers(hf_tokenizer)


def _read(folder: Path, config: Mapping[str, Any]) -> TokenizerFiles:
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    added: dict[str, Any] = config.get("added_tokens_decoder") or {}
    # where all added tokens are written down, transformers takes the older file for outdated
    older = {} if added else _read_json(folder / "special_tokens_map.json")
    settings = {**config, **older}
    names = dict(_named_tokens(settings))
    if not {"bos_token", "eos_token"} <= settings.keys() and config.get("tokenizer_class") not in _NAMELESS:
        names = _named_by_class(folder) | names
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    written = [
        AddedToken(token["content"], **_flags(token)) for _, token in sorted(added.items(), key=_number)
    ]
    extra = [settings.get(key) for key in ("additional_special_tokens", "extra_special_tokens")]
    special = [*names.values(), *(_text(token) for some in extra if isinstance(some, list) for token in some)]
    known |= {token.content for token in written}
    backend.add_tokens(written)
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in special if text not in known])
    return TokenizerFiles(backend, names, _chat_template(folder, config))


def _named_by_class(folder: Path) -> dict[str, str]:
    """Return the special tokens that a model's own tokenizer class has where its files name none."""
    from transformers import AutoTokenizer

    return of_transformers(AutoTokenizer.from_pretrained(str(folder), local_files_only=True)).names


def _named_tokens(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield special tokens by name in the order in which transformers gives new ones their ids."""
    extra = settings.get("extra_special_tokens")
    usual = {name: settings.get(name) for name in _USUAL}
    for name, token in {**usual, **settings, **(extra if isinstance(extra, dict) else {})}.items():
        if name.endswith("_token") and isinstance(token, str | dict) and (text := _text(token)):
            yield name, text


def _text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _flags(token: Mapping[str, Any]) -> dict[str, bool]:
    return {flag: bool(token[flag]) for flag in _FLAGS if flag in token}


def _number(item: tuple[str, Any]) -> int:
    return int(item[0])


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (default := folder / "chat_template.jinja").is_file():
        files["default"] = default
    templates = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    if not templates:
        given = config.get("chat_template")
        if not isinstance(given, list):
            return given
        templates = {one["name"]: one["template"] for one in given}
    return templates["default"] if set(templates) == {"default"} else templates


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
