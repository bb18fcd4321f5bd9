"""The code blocks of README and docs, and the marks above those that the tests of the docs do not run.

A mark is a comment on the line above a block, which no reader sees: `<!-- needs: GPUs -->`. Above a page's
title it holds for all blocks of the page. Blocks of bash without one are run by
`tests/functional/test_docs_commands.py`, page by page from top to bottom.

    needs: GPUs, Slurm       what is not on the machine that runs the tests: see NEEDS
    takes: hours             too long for a test
    tested by: tests/FILE    another test runs it
    runs until: Ctrl-C       run, and stopped when it says where it can be reached
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
    ROOT / "benchmarks/README.md",
]
NEEDS = {
    "GPUs",
    "a CUDA build of torch",
    "Slurm",
    "several nodes",
    "real weights",
    "real data",
    "the network",
}
TAKES = {"minutes", "hours"}
SERVED = "Ctrl-C"
MARK = re.compile(r"<!-- (needs|takes|tested by|runs until): (.+) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    """Relative to the repository."""
    line: int
    """Of its first line of code, from 1."""
    language: str
    text: str
    mark: tuple[str, str] | None
    above: str
    """The last line of text above it."""

    @property
    def is_run(self) -> bool:
        return self.language == "bash" and (self.mark is None or self.mark[0] == "runs until")


def blocks_of(page: Path) -> list[Block]:
    lines, blocks = page.read_text().splitlines(), []
    of_page = MARK.fullmatch(lines[0])
    start = language = above = mark = None
    for number, line in enumerate(lines, 1):
        if start is not None and line == "```":
            text = "\n".join(lines[start : number - 1]) + "\n"
            found = (mark or of_page) and (mark or of_page).groups()
            blocks.append(Block(str(page.relative_to(ROOT)), start + 1, language, text, found, above or ""))
            start = mark = None
        elif start is None and line.startswith("```"):
            start, language = number, line.removeprefix("```")
        elif start is None and line.strip():
            mark = MARK.fullmatch(line)
            above = above if mark else line
    return blocks


def all_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks_of(page)]
