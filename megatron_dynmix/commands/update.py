"""`megatron-dynmix update`: one weight update on given loads or losses, without a model.

Imports neither torch nor Megatron-Core, so that it answers at once. Axes: D sources, L MoE layers, E experts.
"""

from __future__ import annotations

import argparse
import json
import math
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
from megatron_dynmix.mixing.weights import is_number, normalise_weights
from megatron_dynmix.training.mix_setup import controller_of, read_losses, refusing, resolve_files

RUN_ONLY = (
    *("interval", "signal", "probe_tokens", "probe_rows", "load_tokens", "load_mass", "min_tokens"),
    *("override_file", "unit", "similarity_correction", "begin_with", "load_routers"),
)
"""Settings of the mixing section that mean something in a run only."""
GIVE = "give each expert a number of 0 or more, in a list per layer if there are several layers"


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
    # the published rule: loads without halves do not tell the noise, which a run's own default wants to know
    mixing = MixingConfig.from_flat({"strategy": "gate-load", **parse_flags(rest, known)})
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
    counts_DLE = []
    for name in sources:
        load = content[name]
        if not isinstance(load, list) or not load:
            raise ValueError(f"source {name!r} has {load!r:.60}; {GIVE}")
        layered = all(isinstance(load_E, list) for load_E in load)
        counts_DLE.append(load if layered else [load])
        for layer, load_E in enumerate(counts_DLE[-1]):
            _check_layer(load_E, f"source {name!r}, layer {layer}," if layered else f"source {name!r}")
    if len({(len(load_LE), len(load_E)) for load_LE in counts_DLE for load_E in load_LE}) != 1:
        raise ValueError("every source must have the same number of experts, and of layers")
    return np.array(counts_DLE, dtype=np.float64)


def _check_layer(load_E: Sequence[Any], whose: str) -> None:
    """Refuse loads of a layer that are not as `GIVE` says."""
    for expert, value in enumerate(load_E):
        if not is_number(value) or value < 0:
            kind = "a negative load" if is_number(value) else "what is no finite number"
            raise ValueError(f"{whose} has {kind} for expert {expert}: {value!r:.60}; {GIVE}")
    if not load_E or not math.isfinite(sum(map(float, load_E))):
        why = "loads that are too large to be added" if load_E else "no loads"
        raise ValueError(f"{whose} has {why}; {GIVE}")


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object that holds something, or raise InputError."""
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise InputError(f'{path} holds {content!r}; it must hold an object: {{"source": ..., ...}}')
    return content
