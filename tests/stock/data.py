"""Small `.bin/.idx` files of different kinds of text, as Megatron-LM's own preprocessing leaves them."""

import numpy as np
import torch

from megatron_dynmix import platform

SOURCES = ("web", "code", "math")
VOCABULARY = 256


def write_sources(folder, names=SOURCES, documents=120):
    """Write a prefix for each name and return them; every source keeps to a part of the vocabulary."""
    platform.start()
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefixes = []
    for number, name in enumerate(names):
        random = np.random.default_rng(number)
        low = number * VOCABULARY // (2 * len(names))
        prefix = str(folder / name)
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        for _ in range(documents + 17 * number):
            length = int(random.integers(20, 120))
            tokens = low + random.integers(0, VOCABULARY // 2, length) // random.integers(1, 4)
            builder.add_document(torch.from_numpy(tokens), [length])
        builder.finalize(f"{prefix}.idx")
        prefixes.append(prefix)
    return prefixes
