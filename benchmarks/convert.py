"""How fast `convert` is, beside a plain copy of the same files, and how much memory it takes.

The folder is generated: a Mixtral of as many layers as fill it, in bfloat16. Copy and conversion end when
what they wrote is on the disk; the source is in the page cache for both, as far as it fits. `convert` reads
all it wrote once more to compare values: that is measured by itself, and the logits are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from megatron_dynmix import platform

platform.start()

import torch  # noqa: E402  the platform comes before Megatron-Core

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
    "ffn_hidden_size": 3584,
    "num_attention_heads": 16,
    "num_query_groups": 4,
    "num_moe_experts": 8,
    "vocab_size": 32000,
}


class Generated:
    """Tensors of random numbers, made when they are read."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
        self.shapes = shapes
        self.dtypes = dict.fromkeys(shapes, torch.bfloat16)
        self._generator = torch.Generator().manual_seed(seed)

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """Draw so many numbers."""
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=self._generator)


def generate(folder: Path, gigabytes: float, shard_gigabytes: float) -> None:
    """Write a model folder of about this size."""
    layer, rest = (
        2 * sum(torch.Size(shape).numel() for shape in weight_map(settings, MIXTRAL).hf_shapes.values())
        for settings in ({**SIZES, "num_layers": 1}, {**SIZES, "num_layers": 0})
    )
    layers = max(1, round((gigabytes * GIGABYTE - rest) / (layer - rest)))
    names = weight_map({**SIZES, "num_layers": layers}, MIXTRAL)
    tensors = Generated(dict(names.hf_shapes), seed=5)
    folder.mkdir()
    write_weights(tensors, folder, max_shard_bytes=int(shard_gigabytes * GIGABYTE))
    config = {
        **MIXTRAL,
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": SIZES["hidden_size"],
        "intermediate_size": SIZES["ffn_hidden_size"],
        "num_attention_heads": SIZES["num_attention_heads"],
        "num_key_value_heads": SIZES["num_query_groups"],
        "num_local_experts": SIZES["num_moe_experts"],
        "num_experts_per_tok": 2,
        "num_hidden_layers": layers,
        "vocab_size": SIZES["vocab_size"],
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


MIXTRAL = {"model_type": "mixtral"}


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
        generate(scratch / "source", given.gigabytes, given.shard_gigabytes)
        largest = max(path.stat().st_size for path in (scratch / "source").iterdir()) / GIGABYTE

        def inwards(destination: Path) -> None:
            hf_to_megatron(
                scratch / "source", destination, dtype=None, vocab_multiple=128, verify=False, say=print
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
        print(table([*header, "convert CPU s/GB", "anonymous GB", "memory GB"], [there, back]))
        folder, written = HuggingFaceFolder(scratch / "source"), MegatronCheckpoint(checkpoint)
        names = folder.weight_map(written.shapes["embedding.word_embeddings.weight"][0])
        took, _ = seconds(lambda: compare_values(folder, as_hugging_face(written, names), names))
        print(f"comparing values afterwards: {there[1]} GB on either side in {took:.1f} s")
        print(f"largest shard: {largest:.2f} GB; memory is what the process grew by")


if __name__ == "__main__":
    main()
