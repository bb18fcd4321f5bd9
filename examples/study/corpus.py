"""Plain text to pretrain the study's model on: docstrings of what is installed, and the sources' own texts.

Nothing is downloaded. The docstrings are those of the installed versions; in one environment the file is the
same every time.
"""

from __future__ import annotations

import ast
import itertools
import json
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGES = ("numpy", "torch")
"""What the docstrings are of: what the project itself runs on."""
MOST_DOCSTRINGS = 4_000
LEAST_CHARACTERS, MOST_CHARACTERS = 200, 8_000
"""Shorter docstrings teach little, and longer ones are tables."""


def docstrings(packages: Iterable[str]) -> Iterator[str]:
    """Yield each docstring of installed packages once, in the order of the files' names."""
    site = Path(sysconfig.get_path("purelib"))
    seen = set()
    for path in sorted(path for package in packages for path in (site / package).rglob("*.py")):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, RecursionError):
            continue  # templates and tests of parsers: other people's files, and no text to learn from
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if LEAST_CHARACTERS <= len(text) <= MOST_CHARACTERS and text not in seen:
                    seen.add(text)
                    yield text


def conversations(path: Path) -> Iterator[str]:
    """Yield the turns of each row of a ShareGPT file as one plain text, with no template."""
    with path.open(encoding="utf-8", newline="\n") as lines:
        for line in lines:
            yield "\n\n".join(turn["value"] for turn in json.loads(line)["conversations"])


def write(path: Path, texts: Iterable[str]) -> None:
    """Write texts as rows ``{"text": ...}``, whole or not at all."""
    draft = path.with_suffix(".part")
    with draft.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    draft.replace(path)


def write_corpus(data: Path, sources: Iterable[str], folder: Path) -> None:
    """Write `docstrings.jsonl` and `<source>.jsonl` into a folder; what is there is kept."""
    folder.mkdir(exist_ok=True)
    texts = {"docstrings": itertools.islice(docstrings(PACKAGES), MOST_DOCSTRINGS)}
    texts |= {name: conversations(data / name / "train.jsonl") for name in sources}
    for name, rows in texts.items():
        if not (folder / f"{name}.jsonl").is_file():
            write(folder / f"{name}.jsonl", rows)
