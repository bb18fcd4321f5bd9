"""The rules of the house, read from the source: who imports whom, and how long things may be."""

import ast
import sys
from pathlib import Path

import pytest

import megatron_dynmix

PACKAGE = Path(megatron_dynmix.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = {
    "report": {"compare", "errors"},
    "compare": {"training", "data", "monitor", "config", "launch", "errors"},
    "training": {"planning", "data", "moe", "monitor", "convert", "mixing", "config", "platform", "errors"},
    "data": {"config", "platform", "errors"},
    "moe": {"config", "platform", "errors"},
    "convert": {"config", "platform", "errors"},
    "planning": {"monitor", "config", "platform", "errors"},
    "doctor": {"planning", "config", "platform", "errors"},
    "monitor": {"config", "platform", "errors"},
    "config": {"mixing", "errors"},
    "platform": {"errors"},
    "mixing": set(),
}
"""Layer -> the other parts of the project that it may import."""
UNBOUND = {"cli", "launch", "slurm", "__main__", "__init__", "quickstart", "quickstart_examples", "errors"}
"""Single files at the top; the commands among them may import anything."""
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def part_of(path: Path) -> str:
    """`data` for data/blend.py, `cli` for cli.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(path: Path) -> list[tuple[int, str]]:
    """(line, absolute module) of every import of a file, relative ones and those in functions too."""
    found = []
    package = ("megatron_dynmix", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from megatron_dynmix import platform` names a part of the project, not an attribute
            names = [f"{module}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name) for name in (names if module == "megatron_dynmix" else [module])]
    return found


def project_parts(path: Path) -> list[tuple[int, str]]:
    modules = [(line, module.split(".")) for line, module in imported_modules(path)]
    return [(line, parts[1]) for line, parts in modules if parts[0] == "megatron_dynmix" and len(parts) > 1]


def length_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring: what is explained is not too long for it."""
    docstring = function.body[0] if ast.get_docstring(function) else None
    explained = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
    return function.end_lineno - function.lineno + 1 - explained


def test_the_rules_cover_every_part_of_the_package():
    parts = {part_of(path) for path in FILES}
    assert parts <= LAYERS.keys() | UNBOUND, f"no import rule for {parts - LAYERS.keys() - UNBOUND}"
    assert LAYERS.keys() <= parts, f"rules for parts that are gone: {LAYERS.keys() - parts}"


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_one_way(layer):
    allowed = LAYERS[layer] | {layer, "__version__"}
    breaches = [
        f"{name_of(path)}:{line} imports {part}"
        for path in FILES
        if part_of(path) == layer
        for line, part in project_parts(path)
        if part not in allowed
    ]
    assert not breaches, f"{layer} may import {sorted(allowed)} only: {breaches}"


def test_mixing_is_pure():
    allowed = {*sys.stdlib_module_names, "numpy", "megatron_dynmix"}
    breaches = [
        f"{name_of(path)}:{line} imports {module}"
        for path in FILES
        if part_of(path) == "mixing"
        for line, module in imported_modules(path)
        if module.split(".")[0] not in allowed
    ]
    assert not breaches, f"mixing may import numpy, the standard library and itself only: {breaches}"


def test_a_breach_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "mixing").mkdir()
    path = tmp_path / "mixing" / "bad.py"
    path.write_text(
        "from ..data import rows\nfrom .weights import x\ndef f():\n    import torch.nn\n"
        "    from megatron_dynmix import platform\n"
    )
    assert {part for _, part in project_parts(path)} == {"data", "mixing", "platform"}
    assert "torch.nn" in {module for _, module in imported_modules(path)}


def test_nothing_is_named_megatron():
    named = [name_of(path) for path in PACKAGE.rglob("*") if path.stem == "megatron" and path.is_dir()]
    named += [name_of(path) for path in PACKAGE.glob("megatron*")]
    assert not named, f"a top-level name `megatron` would hide Megatron-Core: {named}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines <= MAX_FILE_LINES, f"{name_of(path)} has {lines} lines, more than {MAX_FILE_LINES}"
    long = [
        f"{node.name} (line {node.lineno}) has {length_of(node)} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and length_of(node) > MAX_FUNCTION_LINES
    ]
    assert not long, f"{name_of(path)}: more than {MAX_FUNCTION_LINES} lines: {long}"


def test_only_the_platform_asks_for_cuda():
    asking = [
        name_of(path)
        for path in FILES
        if part_of(path) != "platform" and "torch.cuda.is_available" in path.read_text(encoding="utf-8")
    ]
    assert not asking, f"only platform/ may ask torch.cuda.is_available: {asking}"
