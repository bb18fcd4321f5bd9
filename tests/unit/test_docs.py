"""README and docs say what is true: commands parse, files named exist, the file tree is the package's."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from megatron_dynmix.cli import _parser

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


def commands():
    for path in DOCS:
        for block in blocks(path, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    yield shlex.split(line, comments=True)


@pytest.mark.parametrize(
    "command", [c for c in commands() if c[0].endswith("megatron-dynmix")], ids=lambda c: " ".join(c)
)
def test_commands_in_the_docs_are_understood(command):
    arguments, rest = _parser().parse_known_args(command[1:])
    assert not rest or arguments.takes_flags


@pytest.mark.parametrize("target", sorted({c[1] for c in commands() if c[0] == "make"}))
def test_make_targets_in_the_docs_exist(target):
    assert re.search(rf"^{target}\b.*:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_in_the_docs_lead_somewhere(path):
    for link in re.findall(r"\]\((?!https?://)([^)#]+)", path.read_text()):
        assert (path.parent / link).exists(), link


def test_yaml_in_the_readme_is_a_valid_configuration(tmp_path):
    from megatron_dynmix.config.load import load_config

    (block,) = blocks(ROOT / "README.md", "yaml")
    assert yaml.safe_load(block)
    (tmp_path / "RUN.yaml").write_text(block)
    config = load_config(tmp_path / "RUN.yaml")
    assert list(config.data.sources) == ["chat", "math", "code"]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_python_in_the_docs_runs(path):
    for block in blocks(path, "python"):
        exec(compile(block, str(path), "exec"), {})


def test_file_tree_in_the_architecture_is_the_package():
    text = (ROOT / "docs/architecture.md").read_text()
    tree = text.split("```\nmegatron_dynmix/\n")[1].split("```")[0]
    named, folders = set(), []
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            named.add("".join([*folders, name]))
    package = ROOT / "megatron_dynmix"
    real = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    hidden = {path for path in real if path.endswith("__init__.py") and path not in named}
    assert named == real - hidden - {"__main__.py"}


def test_readme_is_short():
    assert len(README.splitlines()) < 150
