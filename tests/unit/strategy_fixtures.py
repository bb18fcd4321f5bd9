"""A rule of every kind, and signals that each of them can use."""

import numpy as np

from megatron_dynmix.mixing.strategies import STRATEGIES, build_strategy
from megatron_dynmix.mixing.strategy import Signal

NAMES = sorted(STRATEGIES)


def options_for(name, num_sources, rng):
    """What a strategy cannot be built without; the arrays are in the order of the sources."""
    return {
        "final-static": {"weights_D": rng.uniform(0.1, 1, num_sources).tolist()},
        "sent-emb": {"embeddings_DV": rng.normal(size=(num_sources, 6)).tolist()},
        "schedule": {
            "points": [[i * 500, rng.uniform(0.1, 1, num_sources).tolist()] for i in range(3)],
            "interpolation": "linear",
        },
        "ref-loss": {"reference_D": rng.uniform(0.1, 3, num_sources).tolist()},
        "sheared": {"target_D": rng.uniform(0.1, 3, num_sources).tolist()},
        "match-load": {"target_source": 1},
        "uniqueness": {"min_gap": 0.0},  # the signals here have no halves
    }.get(name, {})


def permuted_options(options, order):
    """The same options for the same sources in another order."""
    arrays = {key: [options[key][i] for i in order] for key in options if key.endswith(("_D", "_DV"))}
    if "points" in options:
        arrays["points"] = [[at, [weights[i] for i in order]] for at, weights in options["points"]]
    if "target_source" in options:
        arrays["target_source"] = list(order).index(options["target_source"])
    return {**options, **arrays}


def signal_for(num_sources, rng, iteration=400):
    drawn_D = rng.integers(1, 5000, num_sources)
    return Signal(
        counts_DLE=rng.integers(1, 10**5, (num_sources, 2, 8)),
        loss_D=rng.uniform(0.05, 4, num_sources),
        iteration=iteration,
        train_iters=2000,
        interval_rows=12_800,
        run_rows=20_000,
        size_D=rng.integers(20_000, 10**6, num_sources),
        drawn_D=drawn_D,
        seed=7,
    )


def permuted_signal(signal, order):
    arrays = {key: getattr(signal, key)[order] for key in ("counts_DLE", "loss_D", "size_D", "drawn_D")}
    return Signal(**{**vars(signal), **arrays})


def later(signal, rng):
    """The signal of the next update: some rows more, other losses."""
    return Signal(
        **{
            **vars(signal),
            "iteration": signal.iteration + 100,
            "loss_D": np.maximum(signal.loss_D * rng.uniform(0.9, 1.02, len(signal.loss_D)), 1e-3),
            "drawn_D": signal.drawn_D + rng.integers(1, 5000, len(signal.loss_D)),
        }
    )


def uniform(num_sources):
    return np.full(num_sources, 1 / num_sources)


def strategy_for(name, num_sources, rng):
    return build_strategy(name, options_for(name, num_sources, rng))
