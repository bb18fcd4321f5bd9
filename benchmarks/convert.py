"""How fast `convert` is, beside a plain copy of the same files, and how much memory it takes.

The folder is generated: a Mixtral of as many layers as fill it, in bfloat16; then one whose experts are fp8,
and a gpt-oss whose experts are mxfp4, each of that size when it is read. Copy and conversion end when what
they wrote is on the disk; the source is in the page cache for both, as far as it fits. `convert` reads
all it wrote once more to compare values: that is measured by itself, and the logits are left out.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from megatron_dynmix import platform

platform.start()

import torch  # noqa: E402  the platform comes before Megatron-Core

from megatron_dynmix.config.hugging_face import model_settings  # noqa: E402
from megatron_dynmix.convert.conversion import hf_to_megatron, megatron_to_hf  # noqa: E402
from megatron_dynmix.convert.export_hf import write_weights  # noqa: E402
from megatron_dynmix.convert.hf_folder import HuggingFaceFolder  # noqa: E402
from megatron_dynmix.convert.megatron_checkpoint import MegatronCheckpoint  # noqa: E402
from megatron_dynmix.convert.model_map import weight_map  # noqa: E402
from megatron_dynmix.convert.tensors import as_hugging_face  # noqa: E402
from megatron_dynmix.convert.verdict import compare_values  # noqa: E402
from megatron_dynmix.records.text_table import table  # noqa: E402

GIGABYTE = 1e9
SECONDS_BETWEEN_LOOKS = 0.02
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "sliding_window": None, **SIZES}
FP8 = {**MIXTRAL, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
MXFP4 = {
    **{"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "head_dim": 64, **SIZES},
    "quantization_config": {"quant_method": "mxfp4"},
}
Held = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Tensors of a folder: name -> shape and type."""


class Generated:
    """Tensors of random numbers, made when they are read."""

    def __init__(self, held: Held, seed: int) -> None:
        self.shapes = {name: shape for name, (shape, _) in held.items()}
        self.dtypes = {name: dtype for name, (_, dtype) in held.items()}
        self._generator = torch.Generator().manual_seed(seed)

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """Draw so many numbers; of bytes such that, as exponents, they stand for small ones."""
        if self.dtypes[name] == torch.uint8:
            return torch.randint(110, 125, shape, dtype=torch.uint8, generator=self._generator)
        drawn = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=self._generator)
        return drawn.to(self.dtypes[name])


def plain(config: Mapping[str, Any], layers: int) -> Held:
    """Return the tensors of a model of so many layers, as they are without quantization."""
    said = {**config, "num_hidden_layers": layers}
    shapes = weight_map(
        model_settings({**said, "num_hidden_layers": layers or 1}) | {"num_layers": layers}, said
    )
    return {name: (tuple(shape), torch.bfloat16) for name, shape in shapes.hf_shapes.items()}


def quantized(held: Held, config: Mapping[str, Any]) -> Held:
    """Return what a folder holds of those tensors where config.json says that experts are quantized."""
    method = config.get("quantization_config", {}).get("quant_method")
    found: Held = {}
    for name, (shape, dtype) in held.items():
        if method == "fp8" and ".experts." in name:
            grid = tuple(-(-size // 128) for size in shape)
            found |= {name: (shape, torch.float8_e4m3fn), f"{name}_scale_inv": (grid, torch.float32)}
        elif method == "mxfp4" and name.endswith("_proj"):
            blocks = (*shape[:-1], shape[-1] // 32)
            found |= {f"{name}_blocks": ((*blocks, 16), torch.uint8), f"{name}_scales": (blocks, torch.uint8)}
        else:
            found[name] = shape, dtype
    return found


def generate(folder: Path, gigabytes: float, shard_gigabytes: float, config: Mapping[str, Any]) -> None:
    """Write a model folder of about this size, as plain floats."""
    layer, rest = (
        2 * sum(math.prod(shape) for shape, _ in plain(config, layers).values()) for layers in (1, 0)
    )
    layers = max(1, round((gigabytes * GIGABYTE - rest) / (layer - rest)))
    folder.mkdir()
    tensors = Generated(quantized(plain(config, layers), config), seed=5)
    write_weights(tensors, folder, max_shard_bytes=int(shard_gigabytes * GIGABYTE))
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Largest memory of this process in GB, anonymous and in all, beyond what it had before."""
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info()
    peak = {"anonymous": 0.0, "all": 0.0}

    def look() -> None:
        while not done.wait(SECONDS_BETWEEN_LOOKS):
            now = process.memory_info()
            grown = {
                "anonymous": (now.rss - now.shared) - (before.rss - before.shared),
                "all": now.rss - before.rss,
            }
            for kind, size in grown.items():
                peak[kind] = max(peak[kind], size / GIGABYTE)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the wall, and of processors, until what it wrote is on the disk."""
    start, start_cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - start_cpu


def copy(source: Path, destination: Path) -> None:
    """Copy the files of a folder one after another, and wait for the disk."""
    destination.mkdir()
    for path in source.iterdir():
        if path.is_file():
            shutil.copyfile(path, destination / path.name)
    for path in destination.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def measure(
    name: str, source: Path, convert: Callable[[Path], object], scratch: Path, rounds: int
) -> list[object]:
    """Return a row of the table: copy and convert in turn; the last conversion stays, under `name`."""
    size = sum(path.stat().st_size for path in source.iterdir() if path.is_file()) / GIGABYTE
    copies, conversions = [], []
    gc.collect()
    with peak_memory() as peak:
        for _ in range(rounds):
            copies.append(seconds(lambda: copy(source, scratch / "copy")))
            shutil.rmtree(scratch / "copy")
            shutil.rmtree(scratch / name, ignore_errors=True)
            conversions.append(seconds(lambda: convert(scratch / name)))
    ratio = statistics.median(one[0] / other[0] for one, other in zip(copies, conversions, strict=True))
    (copied, copied_cpu), (converted, converted_cpu) = (
        [statistics.median(column) for column in zip(*times, strict=True)] for times in (copies, conversions)
    )
    return [
        *(name, f"{size:.2f}", f"{size / copied:.2f}", f"{size / converted:.2f}", f"{ratio:.2f}"),
        *(f"{copied_cpu / size:.2f}", f"{converted_cpu / size:.2f}"),
        *(f"{peak['anonymous']:.2f}", f"{peak['all']:.2f}"),
    ]


def main() -> None:
    """Generate, convert there and back, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--shard-gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--directory", type=Path, help="where there is room for four times the size")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.directory) as directory:
        scratch = Path(directory)
        for source, config in (("source", MIXTRAL), ("fp8", FP8), ("mxfp4", MXFP4)):
            generate(scratch / source, given.gigabytes, given.shard_gigabytes, config)

        def inwards(destination: Path, source: str = "source") -> None:
            hf_to_megatron(
                scratch / source, destination, dtype=None, vocab_multiple=128, verify=False, say=print
            )

        def outwards(destination: Path) -> None:
            megatron_to_hf(
                scratch / "hf-to-megatron",
                destination,
                dtype=None,
                max_shard_size=str(int(given.shard_gigabytes * GIGABYTE)),
                fused_experts=None,
                hf_config=None,
                verify=False,
                say=print,
            )

        there = measure("hf-to-megatron", scratch / "source", inwards, scratch, given.rounds)
        checkpoint = scratch / "hf-to-megatron" / "iter_0000000"
        back = measure("megatron-to-hf", checkpoint, outwards, scratch, given.rounds)
        header = ["direction", "GB", "copy GB/s", "convert GB/s", "ratio", "copy CPU s/GB"]
        rows = [there, back]
        for method in ("fp8", "mxfp4"):
            convert = functools.partial(inwards, source=method)
            rows.append(measure(f"{method} to megatron", scratch / method, convert, scratch, given.rounds))
        largest = [
            max(path.stat().st_size for path in (scratch / source).iterdir()) / GIGABYTE
            for source in ("source", "hf-to-megatron/iter_0000000", "fp8", "mxfp4")
        ]
        rows = [[*row, f"{size:.2f}"] for row, size in zip(rows, largest, strict=True)]
        print(table([*header, "convert CPU s/GB", "anonymous GB", "memory GB", "largest file GB"], rows))
        folder, written = HuggingFaceFolder(scratch / "source"), MegatronCheckpoint(checkpoint)
        names = folder.weight_map(written.shapes["embedding.word_embeddings.weight"][0])
        took, _ = seconds(lambda: compare_values(folder, as_hugging_face(written, names), names))
        print(f"comparing values afterwards: {there[1]} GB on either side in {took:.1f} s")
        print("memory is what the process grew by: at most the largest file, of which a map counts, and 1 GB")


if __name__ == "__main__":
    main()
