"""How Sphinx builds these pages: `make docs`."""

import re
from pathlib import Path

INIT = (Path(__file__).parents[1] / "megatron_dynmix/__init__.py").read_text()

project = "Megatron-DynMix"
author = "The Megatron-DynMix authors"
copyright = author
release = re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[1]

extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"Megatron-DynMix {release}"
html_static_path = []
myst_heading_anchors = 3


def setup(app):
    """Links to files of the repository outside these pages become their names."""

    def name_files_outside(app, page, source):
        source[0] = re.sub(r"\[`?([^\]`]+)`?\]\(\.\./([^)]+)\)", r"\1 (`\2`)", source[0])

    app.connect("source-read", name_files_outside)
