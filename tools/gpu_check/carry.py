"""Prepare what a machine without a network lacks: wheels, and the data. `make gpu-wheels` calls it."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from megatron_dynmix.commands.quickstart import make_quickstart
from megatron_dynmix.config.load import load_config
from megatron_dynmix.data.sources import read_data
from megatron_dynmix.data.tokenizer.load import load_tokenizer

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
PACKAGES = (
    *("megatron-core", "absl-py", "annotated-types", "blake3", "markdown-it-py", "mdurl", "orjson"),
    *("packaging", "pillow", "protobuf", "psutil", "pydantic", "pydantic_core", "Pygments", "PyYAML", "rich"),
    *("safetensors", "tensorboard", "tokenizers", "tqdm", "typing-inspection"),
    *("hypothesis", "iniconfig", "pluggy", "pytest", "pytest-timeout", "sortedcontainers"),
)
"""What `train` imports beside torch, NumPy and what those need, and what tests/gpu does.

The versions are those of constraints.txt.
"""
GLIBC = (28, 27, 17)
"""Of the GNU C libraries whose wheels are taken, the minor versions: pip matches each by name."""


def download(folder: Path, python: str) -> None:
    """Fetch one wheel of each package, for Linux on x86-64."""
    platforms = [*(f"manylinux_2_{minor}_x86_64" for minor in GLIBC), "manylinux2014_x86_64"]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"),
            *(
                "--python-version",
                python,
                "--implementation",
                "cp",
                "-d",
                str(folder),
                "-c",
                str(CONSTRAINTS),
            ),
            *(part for platform in platforms for part in ("--platform", platform)),
            *PACKAGES,
        ],
        check=True,
    )


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version of the machine that the wheels are for")
    arguments = parser.parse_args()
    folder = arguments.folder
    for wheel in folder.glob("*.whl"):
        wheel.unlink()  # pip refuses to install two versions of one package
    download(folder, arguments.python)
    run_yaml = make_quickstart(folder / "data")
    config = load_config(run_yaml)
    read_data(config, load_tokenizer(config.data.tokenizer or ""))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
