"""From RUN.yaml and flags to a resolved RunConfig, and back to YAML."""

from __future__ import annotations

import argparse
import os
import re
import sys
import typing
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_dynmix.config import leaves
from megatron_dynmix.config import run_config as tree
from megatron_dynmix.config.strategies import option_hints
from megatron_dynmix.errors import InputError

LONGEST_NAME = 200
"""Bytes of a source's name: a file system has 255, and files of a source have endings."""
PATH_LEAVES = (
    *("tokenizer", "prepared_dir", "pretrained_checkpoint", "load_hf"),
    *("reference", "target", "weights_from", "embeddings", "override_file"),
)


def load_config(path: Path, flags: Sequence[str] = ()) -> tree.RunConfig:
    """Read RUN.yaml, let the flags win over it, fill in the preset.

    Relative paths are taken from the folder of the YAML file, those in flags from the current folder;
    `${NAME}` stands for an environment variable. Flags are spelled as Megatron-LM's: `--bf16`.
    """
    from megatron_dynmix.config.presets import complete_model, has_tokenizer  # `update` has no model

    values: dict[str, dict[str, Any]] = {section: {} for section in tree.SECTIONS}
    for section, settings in _read_yaml(path).items():
        if section not in values:
            raise InputError(f"{path}: {section} is no section{leaves.nearest(section, values)}")
        if not isinstance(settings, dict):
            raise InputError(f"{path}: section {section} holds {settings!r}; it must hold settings by name")
        for name, value in settings.items():
            values[section][name] = _yaml_value(path, section, name, value)
    given = parse_flags(flags)
    if "strategy" in given:
        _leave_options(path, values["mixing"], given["strategy"])
    for name, value in given.items():
        values[leaves.find(name, value).section][name] = value
    for settings in values.values():  # what is as usual goes without saying
        for name in settings.keys() & leaves.refused().keys():
            del settings[name]
    values["data"].setdefault("prepared_dir", _absolute("prepared", path.parent, "data.prepared_dir"))
    values["model"] = complete_model(values["model"])
    load_hf = values["model"].get("load_hf")
    if load_hf is not None and has_tokenizer(Path(load_hf)):
        values["data"].setdefault("tokenizer", load_hf)
    sections: dict[str, Any] = {name: kind.from_flat(values[name]) for name, kind in tree.SECTIONS.items()}
    return tree.RunConfig(**sections)


def _leave_options(path: Path, mixing: dict[str, Any], strategy: str) -> None:
    """Leave out what the file says of its own strategy, if a flag gives another one, and say so.

    Not only what the other does not have: a value that was chosen for one means nothing to another.
    """
    before = mixing.get("strategy", tree.MixingConfig.strategy)
    chosen_for = (*option_hints(), "strategy_options", "begin_with")
    options = {name: mixing[name] for name in mixing if name in chosen_for}
    if strategy == before or not options:
        return
    for name in options:
        del mixing[name]
    if os.environ.get("RANK", "0") == "0":
        said = ", ".join(f"{name} {value}" for name, value in options.items())
        left = f"{path}: {said}: left out, it is for strategy {before} and --strategy is {strategy}"
        print(left, file=sys.stderr)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=StrictLoader)
    except FileNotFoundError:
        raise InputError(
            f"{path}: there is no such file; give the path of a RUN.yaml, and flags after it"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: it cannot be read as a UTF-8 text file: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: it is not valid YAML: {error}") from None
    if not isinstance(raw, dict | None):
        raise InputError(
            f"{path}: it holds {type(raw).__name__}; it must hold sections: {', '.join(tree.SECTIONS)}"
        )
    return raw or {}


def read_mapping(path: Path, meant: str) -> dict[Any, Any]:
    """Read a YAML mapping that holds something; else `InputError`, which says what is `meant`."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=StrictLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path} must hold {meant}")
    return content


class StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, instead of keeping the last; a date is the text it is."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:timestamp"]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node."""
        keys = [self.construct_object(key) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                said = f"the key {key!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, said, node.start_mark)
        return super().construct_mapping(node, deep=True)


def _yaml_value(path: Path, section: str, name: Any, value: Any) -> Any:
    where = f"{path}: {section}.{name}"
    if (section, name) == ("data", "sources"):
        return _sources(where, value, path.parent)
    try:
        leaf = leaves.find(str(name), value)
    except InputError as error:
        raise InputError(f"{path}: in section {section}: {error}") from None
    if leaf.section != section:
        raise InputError(f"{where} is in the wrong section; put {name} under {leaf.section}")
    return _meant(name, leaves.coerce(value, leaf.hint, where), path.parent, where)


def _meant(name: str, value: Any, folder: Path, where: str) -> Any:
    """Return a value whose paths are absolute; options of other strategies are typed as flat ones."""
    if name == "shadow":
        return tuple(entry if isinstance(entry, str) else _typed(entry, where) for entry in value)
    if name == "begin_with" and isinstance(value, dict):
        return _typed(value, where)
    return _absolute(value, folder, where) if _is_path(name, value) else value


def _typed(entry: dict[str, Any], where: str) -> dict[str, Any]:
    hints = option_hints().items()
    given = {key: leaves.coerce(entry[key], hint, f"{where}.{key}") for key, hint in hints if key in entry}
    return {**entry, **given}


def _is_path(name: str, value: Any) -> bool:
    if name == "template":
        return str(value).endswith(tree.JINJA_SUFFIXES)
    if name == "preset":
        from megatron_dynmix.config.presets import is_folder

        return is_folder(value)
    return name in PATH_LEAVES and not str(value).startswith(tree.HUB)


def _sources(where: str, value: Any, folder: Path) -> dict[str, tree.SourceConfig]:
    if not isinstance(value, dict) or not value:
        raise InputError(f"{where} holds {value!r}; it must hold at least one source, as name: {{path: ...}}")
    hints = {**typing.get_type_hints(tree.SourceConfig), "format": str, "fields": dict, "roles": dict}
    sources: dict[str, tree.SourceConfig] = {}
    for name, settings in value.items():
        at = f"{where}.{name}"
        if not isinstance(name, str):  # YAML reads 010 as 8 and `on` as true
            raise InputError(f"{at}: the source's name is read as {name!r}, not as text; put it in quotes")
        check_name(name, at, sources)
        if not isinstance(settings, dict) or "path" not in settings:
            raise InputError(f"{at} holds {settings!r}; it must hold a path: {{path: data/{name}.jsonl}}")
        for key in settings:
            if key not in hints:
                raise InputError(f"{at}.{key} is no setting of a source{leaves.nearest(str(key), hints)}")
        checked = {key: leaves.coerce(item, hints[key], f"{at}.{key}") for key, item in settings.items()}
        for key in ("path", "probe"):
            checked[key] = _absolute(checked.get(key), folder, f"{at}.{key}")
        try:
            sources[name] = tree.SourceConfig(**checked)
        except InputError as error:
            raise InputError(f"{at}: {error}") from None
    return sources


def check_name(name: str, at: str, others: Collection[str]) -> None:
    """Refuse names that files and tags cannot have, and those that readers or disks take for one."""
    kinds = [unicodedata.category(character) for character in name]
    # \w lacks the marks that are written with letters, as vowels of Hindi are
    allowed = all(
        kind[0] in "LM" or kind == "Nd" or it in "._-" for it, kind in zip(name, kinds, strict=True)
    )
    if not allowed or not name or kinds[0][0] == "M":
        raise InputError(
            f"{at}: a source's name may hold letters, digits and . _ - only, those of any script, not "
            f"{name!r}"
        )
    if not unicodedata.is_normalized("NFC", name):
        composed = unicodedata.normalize("NFC", name)
        raise InputError(
            f"{at}: the name is {name!a}, whose letters are decomposed (Unicode NFD), so that it equals no "
            f"other that looks so; write {composed!a} (NFC), here and wherever the source is named"
        )
    if len(name.encode()) > LONGEST_NAME:
        raise InputError(
            f"{at}: the name has {len(name.encode())} bytes, but file names have room for "
            f"{LONGEST_NAME}; shorten it"
        )
    if name.casefold().endswith(".probe"):
        raise InputError(f"{at}: held-out rows are kept under such names; call the source otherwise")
    for other in others:
        if other.casefold() == name.casefold():
            raise InputError(
                f"{at}: there is a source {other}, too, and a disk that ignores case would keep one "
                "file for both; give one of them another name"
            )


def _absolute(text: str | None, folder: Path, where: str) -> str | None:
    if text is None:
        return None
    expanded = os.path.expanduser(os.path.expandvars(text))
    if missing := re.search(r"\$\{?(\w+)", expanded):
        raise InputError(f"{where} is {text!r}, but the variable {missing[1]} is not set; export it first")
    return str((folder.absolute() / expanded).resolve())


def parse_flags(flags: Sequence[str], known: Mapping[str, leaves.Leaf] | None = None) -> dict[str, Any]:
    """Return leaf name -> value of flags as on a command line; all leaves may be set if none are `known`."""
    known = known or leaves.all_leaves()
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS)
    parser.error = _refuse  # type: ignore[assignment, method-assign]
    add_flags(parser, known)
    spaced, unknown = parser.parse_known_args(list(flags))
    if unknown:
        named = unknown[0].partition("=")[0].lstrip("-").replace("-", "_")
        if named.removeprefix("no_") in leaves.refused():
            leaves.find(named.removeprefix("no_"))
        options = [option for action in parser._actions for option in action.option_strings]
        what = "flag" if unknown[0].startswith("-") else "argument"
        raise InputError(f"{unknown[0]} is an unknown {what}{leaves.nearest(unknown[0], options)}")
    return read_flags(vars(spaced), known)


def add_flags(parser: argparse._ActionsContainer, known: Mapping[str, leaves.Leaf], prefix: str = "") -> None:
    """Give a parser a flag of every leaf, for `read_flags` to read; with `prefix`, as `--PREFIX-name`."""
    start, place = (f"{prefix}-", f"{prefix}_") if prefix else ("", "")
    for leaf in known.values():
        aliases = (
            [] if prefix else [f"--{alias}" for alias, to in leaves.FLAG_ALIASES.items() if to == leaf.name]
        )
        names = [f"--{start}{leaf.name.replace('_', '-')}", *aliases]
        is_bool, dest = leaf.hint is bool, place + leaf.name
        # Megatron-LM's ramp takes three words; a list in one does too
        nargs = "?" if is_bool else "+" if leaf.name == "rampup_batch_size" else None
        parser.add_argument(
            *names, dest=dest, nargs=nargs, const="true" if is_bool else None, default=argparse.SUPPRESS
        )
        if is_bool:
            off = [f"--no-{name[2:]}" for name in names]
            off += [f"--{alias}" for alias, to in leaves.FLAG_ALIASES.items() if to == f"no-{leaf.name}"]
            parser.add_argument(*off, dest=dest, action="store_const", const=False, default=argparse.SUPPRESS)


def read_flags(
    given: Mapping[str, Any], known: Mapping[str, leaves.Leaf], prefix: str = ""
) -> dict[str, Any]:
    """Return leaf name -> value of what a parser with `add_flags` was given for these leaves."""
    place, start = (f"{prefix}_", f"--{prefix}-") if prefix else ("", "--")
    parsed = {}
    for key, value in given.items():
        name = key.removeprefix(place)
        if not key.startswith(place) or name not in known:
            continue
        flag = start + name.replace("_", "-")
        if isinstance(value, list):
            value = value[0] if len(value) == 1 else f"[{', '.join(value)}]"
        if not isinstance(value, bool):
            try:
                value = leaves.from_text(value, known[name], flag)
            except InputError:
                leaves.find(name)  # no value would do
                raise
        parsed[name] = _meant(name, value, Path.cwd(), flag)
    return parsed


def _refuse(message: str) -> None:
    raise InputError(message)


def to_dict(config: tree.RunConfig) -> dict[str, dict[str, Any]]:
    """Return the resolved configuration as plain values, flat as in RUN.yaml."""
    return {name: _plain(getattr(config, name).flat()) for name in tree.SECTIONS}


def _plain(value: Any) -> Any:
    if isinstance(value, tree.SourceConfig):
        return {name: item for name, item in value.flat().items() if item is not None}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def to_yaml(config: tree.RunConfig) -> str:
    """Return the resolved configuration as RUN.yaml text that `load_config` reads back to the same tree."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
