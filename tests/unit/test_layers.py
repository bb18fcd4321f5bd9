"""The rules of the house, read from the source: who imports whom, who patches whom, how long things are."""

import ast
import re
import sys
import warnings
from collections.abc import Collection
from pathlib import Path

import pytest

import megatron_dynmix

PACKAGE = Path(megatron_dynmix.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ARCHITECTURE = PACKAGE.parent / "docs/architecture.md"
FROM_ANYWHERE = {"errors", "files", "lease", "__version__"}
"""What every other part may import; `files` and `lease` import `errors`, and nothing else of ours."""
DOORS = {
    "data.sources": {f"data.prepare.{name}" for name in ("prepare", "readers", "inputs")},
    "data.prepare.template": {f"data.prepare.{name}" for name in ("answers", "page")},
    "config.presets": {"config.hugging_face"},
    **{f"training.{name}": {"convert.import_hf", "convert.export_hf"} for name in ("saving", "setup")},
    "training.run": {"convert.import_hf", "convert.export_hf", "training.source_change"},
}
"""What a module imports only in functions that a run of own weights and prepared sources never calls."""
NOT_IN_TRAINING = (
    "families",
    "convert.model_map",
    "commands.planning",
    "data.prepare.encode",
    "data.prepare.workers",
)
MOST_FILES, MOST_LINES = 122, 20_050
"""Of the project, reached by `train`."""
ALARM_FILE_LINES = 400
ALARM_FUNCTION_LINES = 60


def levels():
    """Levels of the rule as the architecture states it, the only place where it stands; the top first."""
    (rule,) = re.findall(r"^(cli -> .*?) -> numpy$", ARCHITECTURE.read_text(), re.DOTALL | re.MULTILINE)
    return [sorted(re.findall(r"\w+", level)) for level in rule.split("->")]


LEVELS = levels()
RANK = {part: rank for rank, parts in enumerate(LEVELS) for part in parts}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def part_of(path: Path) -> str:
    """`data` for data/blend.py, `cli` for cli.py and for what only calls it."""
    part = path.relative_to(PACKAGE).with_suffix("").parts[0]
    return "cli" if part == "__main__" else part


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


def breaches_of(path: Path) -> list[str]:
    """Imports of a file that climb, or that stay on its level and leave its part."""
    own = part_of(path)
    below = {"errors"} if own in FROM_ANYWHERE else FROM_ANYWHERE.union(*LEVELS[RANK[own] + 1 :])
    return [
        f"{name_of(path)}:{line} imports {part}"
        for line, part in project_parts(path)
        if part not in below | {own}
    ]


def length_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring: what is explained is not too long for it."""
    docstring = function.body[0] if ast.get_docstring(function) else None
    explained = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
    return function.end_lineno - function.lineno + 1 - explained


def rebound_names(path: Path) -> list[str]:
    """Where a file gives a new value to something that belongs to an installed package."""
    tree, foreign = ast.parse(path.read_text(encoding="utf-8")), set()
    ours = {*sys.stdlib_module_names, "megatron_dynmix"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.name, alias.asname or alias.name.split(".")[0]) for alias in node.names]
            foreign |= {bound for name, bound in names if name.split(".")[0] not in ours}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] not in ours:
            foreign |= {alias.asname or alias.name for alias in node.names}

    def root(node: ast.expr) -> str | None:
        while isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        return node.id if isinstance(node, ast.Name) else None

    found = []
    for node in ast.walk(tree):
        targets = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = [target for target in node.targets if not isinstance(target, ast.Name)]
        elif isinstance(node, ast.AugAssign | ast.AnnAssign) and not isinstance(node.target, ast.Name):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            targets = node.args[:1] if node.func.id in ("setattr", "delattr") else []
        gives_method = isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node).endswith("MethodType")
        if gives_method or any(root(target) in foreign for target in targets):
            found.append(f"{path.name}:{node.lineno} {ast.unparse(node)}")
    return found


def test_the_rule_names_every_part_and_no_other():
    parts = {part_of(path) for path in FILES} - {"__init__"}
    assert parts - FROM_ANYWHERE == RANK.keys()
    assert len(RANK) == sum(map(len, LEVELS))


@pytest.mark.parametrize("part", [*RANK, "errors", "files", "lease"])
def test_imports_run_one_way(part):
    breaches = [breach for path in FILES if part_of(path) == part for breach in breaches_of(path)]
    assert not breaches, f"see the rule in docs/architecture.md: {breaches}"


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
    assert breaches_of(path) == ["mixing/bad.py:1 imports data", "mixing/bad.py:5 imports platform"]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_platform_changes_installed_packages(path):
    if part_of(path) != "platform":
        assert not rebound_names(path)


def test_a_change_of_an_installed_package_would_be_seen(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text(
        "import os\nimport torch.nn as nn\nfrom megatron.core import parallel_state\n"
        "os.environ['A'] = 'b'\nnn.Module.forward = None\nsetattr(parallel_state, 'x', 1)\nnn = 2\n"
        "import types\nos.x = types.MethodType(print, os)\n"
    )
    assert [found.split()[0] for found in rebound_names(path)] == ["bad.py:5", "bad.py:6", "bad.py:9"]


def test_nothing_is_named_megatron():
    named = [name_of(path) for path in PACKAGE.rglob("*") if path.stem == "megatron" and path.is_dir()]
    named += [name_of(path) for path in PACKAGE.glob("megatron*")]
    assert not named, f"a top-level name `megatron` would hide Megatron-Core: {named}"


def test_long_files_and_functions_are_pointed_out():
    """An alarm, not a limit: a file has one reason to change, however long it is."""
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        long = [name_of(path)] if len(text.splitlines()) > ALARM_FILE_LINES else []
        long += [
            f"{name_of(path)}: {node.name}"
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and length_of(node) > ALARM_FUNCTION_LINES
        ]
        for place in long:
            warnings.warn(f"{place} is long: does it have one reason to change?", stacklevel=1)


def module_of(path: Path) -> str:
    name = ".".join(("megatron_dynmix", *path.relative_to(PACKAGE).with_suffix("").parts))
    return name.removesuffix(".__init__")


def modules_needed(path: Path, modules: Collection[str], *, at_once: bool = False) -> set[str]:
    """Modules of the project that a file imports, in functions too if not `at_once`, not for types."""
    package = ("megatron_dynmix", *path.relative_to(PACKAGE).parent.parts)
    found, nodes = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if at_once and isinstance(node, ast.FunctionDef):
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {
                name if (name := f"{module}.{alias.name}") in modules else module for alias in node.names
            }
    return (found & set(modules)) - {"megatron_dynmix"}


def test_no_module_needs_itself():
    """No circle of imports, not even one that imports inside functions would hide."""
    modules = {module_of(path): path for path in FILES}
    graph = {name: modules_needed(path, modules) - {name} for name, path in modules.items()}
    while leaves := {name for name, needs in graph.items() if not needs & graph.keys()}:
        graph = {name: needs for name, needs in graph.items() if name not in leaves}
    while tops := graph.keys() - set().union(*graph.values()):
        graph = {name: needs for name, needs in graph.items() if name not in tops}
    assert not graph, f"these need one another: {sorted(graph)}"


def test_training_prepared_sources_needs_neither_what_prepares_nor_what_converts():
    """Imports in functions count as well, but for the doors, which no module opens as it is imported."""
    modules = {module_of(path): path for path in FILES}
    reached, todo = set(), ["megatron_dynmix.commands.train"]
    while todo:
        name = todo.pop()
        if name in reached:
            continue
        reached.add(name)
        doors = {f"megatron_dynmix.{door}" for door in DOORS.get(name.removeprefix("megatron_dynmix."), ())}
        assert not doors & modules_needed(modules[name], modules, at_once=True)
        todo += modules_needed(modules[name], modules) - doors
    lines = sum(len(modules[name].read_text(encoding="utf-8").splitlines()) for name in reached)
    assert not reached & {f"megatron_dynmix.{name}" for name in NOT_IN_TRAINING}
    assert len(reached) <= MOST_FILES and lines <= MOST_LINES, f"{len(reached)} files, {lines} lines"


def test_only_the_platform_asks_for_cuda():
    asking = [
        name_of(path)
        for path in FILES
        if part_of(path) != "platform" and "torch.cuda.is_available" in path.read_text(encoding="utf-8")
    ]
    assert not asking, f"only platform/ may ask torch.cuda.is_available: {asking}"
