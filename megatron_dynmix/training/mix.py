"""The mix of a run: what decides its weights, made once, how far it goes, and the weights it begins with.

Axis: D sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.batch_schedule import BatchSchedule, Pairs
from megatron_dynmix.config.run_config import MixingConfig
from megatron_dynmix.errors import InputError
from megatron_dynmix.mixing.controller import MixingController
from megatron_dynmix.mixing.gate_loads import select_layers
from megatron_dynmix.mixing.strategy import Signal
from megatron_dynmix.mixing.weights import normalise_weights
from megatron_dynmix.training.mix_setup import (
    Resolved,
    controller_of,
    guardrails_of,
    in_rows,
    prior_of,
    refusing,
    resolve_files,
    row_caps,
    strategy_of,
)

if TYPE_CHECKING:
    from megatron_dynmix.data.packed import PackedSource
    from megatron_dynmix.data.rows import PackedRows


@dataclass(frozen=True, kw_only=True)
class Horizon:
    """How far a run goes, in iterations and rows."""

    schedule: BatchSchedule
    train_iters: int
    interval: int
    seed: int
    size_D: NDArray[np.int64]
    """Rows of an epoch of each source."""
    cap_D: NDArray[np.float64]
    """Most rows that may be drawn of each source, infinity where there is no cap."""

    @classmethod
    def of(
        cls, config: RunConfig, resolved: Resolved, size_D: NDArray[np.int64], done: Pairs = ()
    ) -> Horizon:
        """Return the horizon of a configuration that was checked, and of batches that are done."""
        assert config.training.train_iters is not None, "checked before start"
        return cls(
            schedule=replace(BatchSchedule.of(config), done=done),
            train_iters=config.training.train_iters,
            interval=config.mixing.interval,
            seed=config.training.seed,
            size_D=size_D,
            cap_D=row_caps(resolved, size_D),
        )

    @property
    def run_rows(self) -> int:
        """Return the rows of the whole run."""
        return self.schedule.samples_at(self.train_iters)

    def signal(self, iteration: int, consumed_samples: int, drawn_D: NDArray[np.int64]) -> Signal:
        """Return what a strategy is told beside the measurements."""
        return Signal(
            iteration=iteration,
            train_iters=self.train_iters,
            interval_rows=self._interval_rows(iteration, consumed_samples, drawn_D),
            run_rows=self.run_rows,
            size_D=self.size_D,
            drawn_D=drawn_D,
            seed=self.seed,
        )

    def _interval_rows(self, iteration: int, consumed_samples: int, drawn_D: NDArray[np.int64]) -> int:
        """Return the rows until the next weights.

        Those of a whole interval, though the run may end before: it may be resumed with more iterations,
        and the caps must hold then too. Only where the caps leave less, what the run itself still takes.
        """

        def rows(iterations: int) -> int:
            return self.schedule.samples_after(iterations, consumed_samples) - consumed_samples

        whole = rows(self.interval)
        left = np.maximum(self.cap_D - drawn_D, 0).sum()
        if left >= whole:
            return whole
        return max(int(left), rows(max(min(self.interval, self.train_iters - iteration), 0)))


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What decides the weights of a run, made once, and the weights that it begins with."""

    settings: MixingConfig
    resolved: Resolved
    horizon: Horizon
    controller: MixingController
    """Started: its weights are the first ones."""
    initial_D: NDArray[np.float64]
    """Shares of the rows that the sources were given, before the strategy chose the first weights."""
    first_D: NDArray[np.float64]

    @classmethod
    def of(cls, config: RunConfig, resolved: Resolved, rows: Sequence[PackedRows], done: Pairs = ()) -> Mix:
        """Make the controller of a run and ask it for the first weights.

        Raises:
            InputError: there are no such weights; or caps cannot feed the run: how many rows are missing.

        """
        resolved = {**resolved, **_of_rows(config, rows)}
        horizon = Horizon.of(config, resolved, np.array([len(source) for source in rows], np.int64), done)
        return cls.beginning(
            config.mixing, resolved, list(config.data.sources), horizon, initial_weights(config)
        )

    @classmethod
    def beginning(
        cls,
        mixing: MixingConfig,
        resolved: Resolved,
        names: Sequence[str],
        horizon: Horizon,
        weights_D: NDArray[np.float64],
    ) -> Mix:
        """Make the controller of any run, as `of` does; `weights_D` are given, in the configured unit."""
        initial_D = in_rows(weights_D, resolved)
        missing = horizon.run_rows - horizon.cap_D.sum()
        if missing > 0:
            raise InputError(
                f"max_epochs of the sources allows {int(horizon.cap_D.sum())} rows, but the run takes "
                f"{horizon.run_rows}: {int(missing)} rows are missing; raise max_epochs, give more data, or "
                "use fewer train_iters"
            )
        with refusing(mixing, sources=names):
            controller = controller_of(mixing, resolved, names, horizon.size_D, initial_D)
            first = controller.start(horizon.signal(0, 0, np.zeros_like(horizon.size_D)))
        return cls(
            settings=mixing,
            resolved=resolved,
            horizon=horizon,
            controller=controller,
            initial_D=initial_D,
            first_D=first.weights_D,
        )


def resolve(config: RunConfig) -> dict[str, Any]:
    """Return what the settings of a run say by file and by source; `InputError` if a file cannot be used."""
    sources = config.data.sources
    resolved = resolve_files(config.mixing, list(sources))
    caps = [source.max_epochs for source in sources.values()]
    if any(cap is not None for cap in caps):
        resolved["max_epochs"] = caps
    return resolved


def _of_rows(config: RunConfig, rows: Sequence[PackedRows | PackedSource]) -> dict[str, Any]:
    if rows and config.mixing.unit == "examples":
        return {"examples_per_row": [source.mean_examples_per_row for source in rows]}
    return {}


def check_mix(config: RunConfig, num_layers: int) -> dict[str, Any]:
    """Refuse, as `InputError`, strategies, shadows and guardrails that cannot be made, whatever the data.

    Return what the settings say by file and by source, for `Mix.of`.
    """
    resolved = resolve(config)
    check_mixing(config.mixing, resolved, list(config.data.sources), num_layers)
    return resolved


def check_mixing(mixing: MixingConfig, resolved: Resolved, names: Sequence[str], num_layers: int) -> None:
    """Refuse, as `InputError`, what cannot be made for so many MoE layers, whatever the data."""
    with refusing(mixing, sources=names):
        for chosen in (mixing.chosen, *mixing.shadows):
            strategy = strategy_of(chosen, resolved)
            if strategy.needs_gate_load:
                select_layers(strategy.layers, num_layers)
        prior_D = prior_of(mixing, resolved, names, np.ones(len(names), np.int64))
        guardrails_of(mixing, resolved, prior_D).check(len(names))


def initial_weights(config: RunConfig) -> NDArray[np.float64]:
    """Return the shares of the sources as given, in the configured unit; uniform if none was."""
    weights = {
        name: 1.0 if source.weight is None else source.weight for name, source in config.data.sources.items()
    }
    return normalise_weights(weights)


def initial_shares(config: RunConfig, rows: Sequence[PackedSource]) -> NDArray[np.float64]:
    """Return the shares of the rows that the sources are given; the strategy may choose others."""
    return in_rows(initial_weights(config), _of_rows(config, rows))
