"""What stick-breaking attention by blocks costs beside `scaled_dot_product_attention` (softmax) on this CPU.

Both attend causally with the same queries, keys and values, a forward and a backward pass on one thread, in
rounds that take turns; CPU time of the process is read, which other programs on the machine disturb less.
The published shape: one head of keys as wide as the model, and as many queries as a token has experts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_dynmix.model.stick_breaking import stick_breaking_attention
from megatron_dynmix.records.text_table import table

TARGET = 1.5
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def sticks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Break sticks over whole rows."""
    own_Q = torch.arange(query.shape[2])
    return stick_breaking_attention(query, key, value, torch.zeros_like(own_Q)[None], own_Q)


def softmax(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attend by a softmax, the experts' queries as heads that share their keys."""
    heads = query.squeeze(1).transpose(1, 2)
    return scaled_dot_product_attention(heads, key, value, is_causal=True, enable_gqa=True)


def seconds(attend: Attend, length: int, experts: int, width: int) -> list[float]:
    """Return CPU seconds of a forward and of a backward pass."""
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, 1, length, *shape, requires_grad=True)
        for shape in ((experts, width), (width,), (width,))
    )
    start = time.process_time()
    context = attend(query, key, value)
    middle = time.process_time()
    context.backward(torch.ones_like(context))
    return [middle - start, time.process_time() - middle]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=4, help="attention experts of a token")
    parser.add_argument("--width", type=int, default=1024, help="of the one head")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shape = (arguments.seq_length, arguments.experts, arguments.width)
    times_R22 = np.array(
        [[seconds(attend, *shape) for attend in (sticks, softmax)] for _ in range(arguments.rounds)]
    )
    medians_22 = np.median(times_R22, axis=0)
    lines = [
        [name, *(f"{value:.3f}" for value in (*row_2, row_2.sum()))]
        for name, row_2 in zip(("stick-breaking", "softmax"), medians_22, strict=True)
    ]
    ratio = medians_22[0].sum() / medians_22[1].sum()
    print(table(["attention", "forward, s", "backward, s", "both, s"], lines))
    print(f"\nstick-breaking takes {ratio:.2f} times as long (target: at most {TARGET})")


if __name__ == "__main__":
    main()
