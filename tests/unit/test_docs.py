"""README and docs say what is true: commands parse, files named exist, the file tree is the package's."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from megatron_dynmix.cli import COMMANDS, parser_of
from megatron_dynmix.mixing.gate_loads import AGGREGATES, DISTANCES
from megatron_dynmix.mixing.strategies.losses import VARIANTS
from megatron_dynmix.mixing.strategies.planned import INTERPOLATIONS
from tests.docs_blocks import NEEDS, PAGES, SERVED, TAKES, all_blocks, blocks_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BASH = [block for block in all_blocks() if block.language == "bash"]


def page_of(path):
    return str(path.relative_to(ROOT))


def commands():
    for block in BASH:
        for line in block.text.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith("#"):
                yield shlex.split(line, comments=True)


@pytest.mark.parametrize("block", BASH, ids=lambda block: f"{block.page}:{block.line}")
def test_a_block_of_commands_is_run_or_says_why_not(block):
    if block.mark is None:
        return  # tests/functional/test_docs_commands.py
    kind, reasons = block.mark
    if kind == "tested by":
        assert reasons.startswith("tests/")
        test, argument = (ROOT / reasons).read_text(), shlex.split(block.text)[1]
        assert block.page in test or argument in test
    else:
        known = {"needs": NEEDS, "takes": TAKES, "runs until": {SERVED}}[kind]
        assert set(reasons.split(", ")) <= known


def test_reasons_that_nothing_has_are_gone():
    given = {kind: set() for kind in ("needs", "takes", "runs until", "tested by")}
    for block in BASH:
        if block.mark:
            given[block.mark[0]].update(block.mark[1].split(", "))
    assert (given["needs"], given["takes"], given["runs until"]) == (NEEDS, TAKES, {SERVED})


def test_marks_stand_above_commands_and_commands_are_called_bash():
    for path in PAGES:
        text, blocks = path.read_text(), blocks_of(path)
        marked = [block for block in blocks if block.mark and block.language in ("bash", "python")]
        of_page = text.startswith("<!-- ")
        assert of_page or len(marked) == len(re.findall("^<!-- ", text, re.MULTILINE)), path
        assert {block.language for block in blocks} <= {
            "",
            "bash",
            "python",
            "yaml",
            "json",
            "text",
            "{toctree}",
        }, path


def test_every_page_is_in_the_index():
    index = blocks_of(ROOT / "docs/index.md")
    listed = [line for block in index for line in block.text.splitlines() if line and line[0] != ":"]
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert sorted(listed) == sorted(pages)


def test_every_command_has_a_page_that_speaks_of_it():
    (choices,) = (action.choices for action in parser_of(COMMANDS)._actions if action.dest == "==SUPPRESS==")
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", (ROOT / "docs/commands.md").read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == list(choices)
    for name, links in rows:
        pages = [(ROOT / "docs" / link).read_text() for link in re.findall(r"\((\w+\.md)\)", links)]
        assert any(re.search(rf"(make|megatron-dynmix) {name}\b", page) for page in pages), name


@pytest.mark.parametrize(
    "command", [c for c in commands() if c[0].endswith("megatron-dynmix")], ids=lambda c: " ".join(c)
)
def test_commands_in_the_docs_are_understood(command):
    _arguments, rest = parser_of(COMMANDS).parse_known_args(command[1:])
    _, takes_flags = COMMANDS[command[1]]
    assert not rest or takes_flags


@pytest.mark.parametrize("target", sorted({c[1] for c in commands() if c[0] == "make"}))
def test_make_targets_in_the_docs_exist(target):
    assert re.search(rf"^{target}\b.*:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", PAGES, ids=page_of)
def test_links_in_the_docs_lead_somewhere(path):
    for link in re.findall(r"\]\((?!https?://)([^)#]+)", path.read_text()):
        assert (path.parent / link).exists(), link


def test_yaml_in_the_readme_is_a_valid_configuration(tmp_path):
    from megatron_dynmix.config.load import load_config

    (block,) = (block for block in blocks_of(ROOT / "README.md") if block.language == "yaml")
    (tmp_path / "RUN.yaml").write_text(block.text)
    config = load_config(tmp_path / "RUN.yaml")
    assert list(config.data.sources) == ["chat", "math", "code"]


@pytest.mark.parametrize("path", PAGES, ids=page_of)
def test_python_in_the_docs_runs(path):
    for block in blocks_of(path):
        if block.language == "python" and block.mark is None:
            exec(compile(block.text, str(path), "exec"), {})


def test_folders_in_the_architecture_are_the_package():
    text = (ROOT / "docs/architecture.md").read_text()
    tree = text.split("```\nmegatron_dynmix/\n")[1].split("```")[0]
    assert len(tree.splitlines()) <= 40
    named, folders = set(), []
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        folders = folders[:depth]
        named.add("".join([*folders, name]))
        if name.endswith("/"):
            folders.append(name)
    package = ROOT / "megatron_dynmix"
    real = {f"{path.parent.relative_to(package)}/" for path in package.glob("*/**/*.py")}
    real |= {path.name for path in package.glob("*.py")}
    assert named == real - {"__init__.py", "__main__.py"}


def test_readme_is_short():
    assert len(README.splitlines()) < 150


def test_page_of_all_settings_is_up_to_date():
    """Also that every setting has a meaning: the page cannot be made without."""
    reference = runpy.run_path(str(ROOT / "tools/config_reference.py"))["reference"]
    page = (ROOT / "docs/configuration.md").read_text()
    assert page == reference(), "python tools/config_reference.py docs/configuration.md"


def test_page_of_all_settings_speaks_to_users():
    page = (ROOT / "docs/configuration.md").read_text()
    ours = page.partition("## Fields of Megatron-Core")[0].replace("`WSD`", "Megatron-LM's own word")
    assert not re.findall(r"`[A-Z]{2,}_?[A-Z]*`|see `\w+", ours)
    for name in (*DISTANCES, *AGGREGATES, *INTERPOLATIONS, *VARIANTS):
        assert f"``{name}``" in page


def test_the_picture_of_uniqueness_is_what_the_rules_make_of_it():
    draw = runpy.run_path(str(ROOT / "tools/picture_of_uniqueness.py"))["svg"]
    assert (ROOT / "docs/images/uniqueness.svg").read_text() == draw()
