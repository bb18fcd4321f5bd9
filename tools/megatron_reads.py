"""Write where each of Megatron-Core's settings is read on the way of a run, from the version installed.

    python tools/megatron_reads.py tools/megatron_reads.json

Functions of Megatron-Core are on the way if their name stands in `megatron_dynmix` or in a function that is;
methods, if that of their class does too, and `forward`, `backward` and those with underscores always. That
takes too many rather than too few: who is not read here is read by nobody. A setting counts as read where an
attribute of its name is, outside of the dataclasses' own files; in those, where another attribute is made of
it. Else, where our code names it. A setting that is read nowhere would do nothing: `config/decided.py`
refuses it, or the test fails.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import importlib.util
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from megatron_dynmix import platform
from megatron_dynmix.config.decided import DECIDED
from megatron_dynmix.config.megatron_fields import megatron_fields

OWNERS = {
    "ModelParallelConfig": "megatron.core.model_parallel_config",
    "DistributedDataParallelConfig": "megatron.core.distributed.distributed_data_parallel_config",
    "MLATransformerConfig": "megatron.core.transformer.transformer_config",
    "OptimizerConfig": "megatron.core.optimizer.optimizer_config",
}
"""Dataclasses and their modules; `MLATransformerConfig` has all fields of a transformer's."""
ELSEWHERE = (
    *(
        "datasets",
        "distributed/fsdp",
        "export",
        "inference",
        "models/T5",
        "models/bert",
        "models/huggingface",
    ),
    *("models/mamba", "models/mimo", "models/multimodal", "models/retro", "models/vision", "post_training"),
    *("quantization", "resharding", "rl", "ssm", "tokenizers"),
)
"""Parts of Megatron-Core that no run comes to."""
OURS = Path(platform.__file__).parents[1]


@dataclasses.dataclass
class Seen:
    """What stands in a piece of code: names of all kinds, attributes that are read, texts."""

    names: set[str]
    reads: set[str]
    texts: set[str]


@dataclasses.dataclass
class Function:
    """A function or method, and what stands in it."""

    place: str
    name: str
    owner: str | None
    seen: Seen

    def is_called(self, named: set[str]) -> bool:
        """Whether code in which these names stand may come here."""
        if self.owner is None:
            return self.name in named
        unnamed = self.name in ("forward", "backward") or self.name.startswith("__")
        return self.owner in named and (unnamed or self.name in named)


def settable() -> set[str]:
    """Return the fields that may be given, of those that the installed version has."""
    kinds = [getattr(importlib.import_module(module), name) for name, module in OWNERS.items()]
    installed = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    return {name for fields in megatron_fields().values() for name in fields} & installed - DECIDED.keys()


def reads(settings: set[str]) -> dict[str, str]:
    """Return setting -> one place where it is read, empty if there is none."""
    core = Path(importlib.util.find_spec("megatron").submodule_search_locations[0]) / "core"  # type: ignore[union-attr,index]
    ours = {path: _seen(ast.parse(path.read_text())) for path in sorted(OURS.rglob("*.py"))}
    named = {name for seen in ours.values() for name in seen.names}
    own_files = {
        f"{module.removeprefix('megatron.core.').replace('.', '/')}.py" for module in OWNERS.values()
    }
    found: dict[str, set[str]] = defaultdict(set)
    for function in _on_the_way(core, named):
        if function.place.partition(":")[0] not in own_files:
            for name in function.seen.reads:
                found[name].add(function.place)
    for file in own_files:
        for name in _made_into_others(ast.parse((core / file).read_text())):
            found[name].add(f"{file}:__post_init__")
    for path, seen in ours.items():
        if path.parent.name != "config" or path.name == "megatron.py":  # the others check what is given
            for name in seen.names | seen.texts:
                found[name].add(f"megatron_dynmix/{path.relative_to(OURS).as_posix()}")
    return {name: _first(found[name]) for name in sorted(settings)}


def _first(places: set[str]) -> str:
    """Return a place in Megatron-Core, if there is one, or one of ours."""
    return min(places, key=lambda place: (place.startswith("megatron_dynmix"), place), default="")


def _on_the_way(core: Path, named: set[str]) -> list[Function]:
    functions: dict[str, list[Function]] = defaultdict(list)
    bases: dict[str, set[str]] = defaultdict(set)
    for path in sorted(core.rglob("*.py")):
        file = path.relative_to(core).as_posix()
        if not file.startswith(ELSEWHERE):
            _collect(ast.parse(path.read_text()), file, None, functions, bases)
    way: list[Function] = []
    named, left = set(named), [one for several in functions.values() for one in several]
    while True:
        for owner in bases.keys() & named:
            named |= bases[owner]
        reached = [one for one in left if one.is_called(named)]
        if not reached:
            return way
        left = [one for one in left if not one.is_called(named)]
        way += reached
        named = named.union(*(one.seen.names for one in reached))


def _collect(
    node: ast.AST,
    file: str,
    owner: str | None,
    functions: dict[str, list[Function]],
    bases: dict[str, set[str]],
) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            bases[child.name] |= {name for base in child.bases for name in _seen(base).names}
            _collect(child, file, child.name, functions, bases)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            place = f"{file}:{owner}.{child.name}" if owner else f"{file}:{child.name}"
            functions[child.name].append(Function(place, child.name, owner, _seen(child)))
        else:
            _collect(child, file, owner, functions, bases)


def _seen(node: ast.AST) -> Seen:
    seen = Seen(set(), set(), set())
    for one in ast.walk(node):
        if isinstance(one, ast.Name):
            seen.names.add(one.id)
        elif isinstance(one, ast.Attribute):
            seen.names.add(one.attr)
            if isinstance(one.ctx, ast.Load):
                seen.reads.add(one.attr)
        elif isinstance(one, ast.keyword) and one.arg:
            seen.names.add(one.arg)
        elif isinstance(one, ast.alias):
            seen.names.add(one.name.rpartition(".")[2])
        elif isinstance(one, ast.Constant) and isinstance(one.value, str):
            seen.texts.add(one.value)
        elif isinstance(one, ast.Call) and isinstance(one.func, ast.Name) and one.func.id == "getattr":
            seen.reads |= {arg.value for arg in one.args if isinstance(arg, ast.Constant)}
    return seen


def _made_into_others(tree: ast.Module) -> Iterator[str]:
    """Yield the settings from which, or on condition of which, another attribute is made."""

    def within(node: ast.AST, conditions: set[str]) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            given = conditions | (_seen(child.test).reads if isinstance(child, ast.If) else set())
            if isinstance(child, ast.Assign):
                targets = (one for target in child.targets for one in ast.walk(target))
                if made := {one.attr for one in targets if isinstance(one, ast.Attribute)}:
                    yield from (given | _seen(child.value).reads) - made
            yield from within(child, given)

    for one in ast.walk(tree):
        if isinstance(one, ast.FunctionDef) and one.name == "__post_init__":
            yield from within(one, set())


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("output", type=Path)
    platform.start()
    text = json.dumps(reads(settable()), indent=1)
    parser.parse_args().output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
