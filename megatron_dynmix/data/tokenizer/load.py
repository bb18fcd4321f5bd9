"""Which tokenizer a path or name means."""

from pathlib import Path

from megatron_dynmix.config.run_config import HUB
from megatron_dynmix.data.tokenizer.base import Tokenizer
from megatron_dynmix.data.tokenizer.fast import load_fast
from megatron_dynmix.errors import InputError


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """Load a tokenizer: a Hugging Face folder, a SentencePiece ``.model`` or a ``.tiktoken`` file.

    ``hf://ORGANISATION/NAME`` fetches one from the Hugging Face hub; for anything else the network is
    never asked. ``trust_remote_code`` lets Hugging Face run Python code that comes with the tokenizer. No
    such file, no tokenizer in it, not a fast one, or no EOS token is an InputError.
    """
    name = str(path)
    if name.startswith(HUB):
        return load_fast(name, name.removeprefix(HUB), trust_remote_code, local=False)
    path = Path(path)
    if path.is_dir():
        return load_fast(name, name, trust_remote_code, local=True)
    if not path.is_file():
        raise InputError(
            f"tokenizer {path}: not a folder, nor a file; give a local folder that holds tokenizer.json, a "
            f"SentencePiece .model or a .tiktoken file ({HUB}ORGANISATION/NAME is downloaded)"
        )
    if path.suffix not in (".model", ".tiktoken"):
        raise InputError(
            f"tokenizer {path}: a file that is neither .model (SentencePiece) nor .tiktoken; for a "
            "tokenizer.json give the folder that it lies in"
        )
    # here, not above: it brings a library that few need
    from megatron_dynmix.data.tokenizer.pieces import SentencePieceTokenizer, TiktokenTokenizer

    return SentencePieceTokenizer(path) if path.suffix == ".model" else TiktokenTokenizer(path)
