"""`megatron-dynmix update`: one weight update on given loads or losses, without a model.

Imports neither torch nor Megatron-Core, so that it answers at once. Axes: D sources, L MoE layers, E experts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.config import leaves
from megatron_dynmix.config.load import parse_flags
from megatron_dynmix.config.run_config import MixingConfig
from megatron_dynmix.errors import InputError
from megatron_dynmix.files import read_json
from megatron_dynmix.mixing.strategy import Signal
from megatron_dynmix.mixing.weights import normalise_weights
from megatron_dynmix.training.mix_setup import controller_of, read_losses, refusing, resolve_files

RUN_ONLY = (
    *("interval", "signal", "probe_tokens", "probe_rows", "load_tokens", "load_mass", "min_tokens"),
    *("override_file", "unit"),
)
"""Settings of the mixing section that mean something in a run only."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the files that an update is computed from; settings of the mixing section are flags, too."""
    parser.add_argument("--load", type=Path, metavar="FILE", help='JSON: {"source": [load per expert], ...}')
    parser.add_argument("--loss", type=Path, metavar="FILE", help='JSON: {"source": loss in nats, ...}')
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help='JSON: {"source": weight, ...}; default uniform'
    )


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Print the weights after one update, and the numbers they came from, by source as JSON."""
    load, loss, weights = arguments.load, arguments.loss, arguments.weights
    known = {name: leaf for name, leaf in leaves.mixing_leaves().items() if name not in RUN_ONLY}
    mixing = MixingConfig.from_flat(parse_flags(rest, known))
    contents = {path: _read_object(path) for path in (load, loss, weights) if path is not None}
    if not contents:
        raise InputError("there is nothing to update from; give --load FILE.json, --loss FILE.json or both")
    sources = list(next(iter(contents.values())))
    try:
        weights_D = normalise_weights(contents.get(weights, dict.fromkeys(sources, 1.0)), sources)
    except (ValueError, TypeError) as error:
        raise InputError(f"{weights}: {error}") from None
    with refusing(mixing, str(load or loss or weights), sources):
        counts_DLE = None if load is None else _loads(contents[load], sources)
        loss_D = None if loss is None else np.array(read_losses(loss, sources))
        if mixing.prior == "size":
            raise ValueError(
                "prior size needs the sizes of prepared sources; give {source: weight} or uniform"
            )
        size_D = np.ones(len(sources), np.int64)
        controller = controller_of(mixing, resolve_files(mixing, sources), sources, size_D, weights_D)
        signal = Signal(counts_DLE=counts_DLE, loss_D=loss_D)
        decision = controller.update(signal) if controller.updates else controller.start(signal)

    def named(values_D: NDArray[np.float64]) -> dict[str, float]:
        return dict(zip(sources, values_D.tolist(), strict=True))

    answer = {
        "weights": named(decision.weights_D),
        "delta": named(decision.proposal.delta_D),
        "note": "; ".join(note.text for note in decision.notes) or None,
        "events": [event.text for event in decision.events],
        "shadow": {label: named(shadow.weights_D) for label, shadow in decision.shadow.items()},
    }
    print(json.dumps(answer, indent=2))
    return 0


def _loads(content: Mapping[str, Any], sources: Sequence[str]) -> NDArray[np.float64]:
    """Return `[D, L, E]` of one layer or several."""
    loads = [content[name] for name in sources]
    if len({np.shape(load) for load in loads}) != 1:
        raise ValueError("every source must have the same number of experts, and of layers")
    counts = np.array(loads, dtype=np.float64)
    if counts.ndim == 2:
        counts = counts[:, None, :]
    if counts.ndim != 3:
        raise ValueError("the load of a source must be a list of numbers, or one such list per layer")
    return counts


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object that holds something, or raise InputError."""
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise InputError(f'{path} holds {content!r}; it must hold an object: {{"source": ..., ...}}')
    return content
