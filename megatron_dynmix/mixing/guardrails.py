"""What wins over a strategy: limits that keep it from collapsing the mix, and the operator of a running job.

The limits are applied in this order:

1. *Pull* towards a prior. A wish of the operator, not a limit, so it comes first and everything below holds
   for its result.
2. *Pause, repetition cap, floor*: each source has a smallest and a largest share. A pause and a used-up
   source are facts and cannot be traded for anything, so the floor gives way to them, for those only.
3. *Entropy*: the mix moves towards the evenest one within those shares until it is even enough.
4. *KL step*: from the weights in force the mix goes towards the result of 1 to 3 only as far as the limit
   allows. This comes last because all mixes that 2 and 3 permit form a convex set: a point between two
   permitted mixes is permitted, so shortening the step breaks nothing.

Where the weights in force are themselves outside what 2 and 3 permit (a source has just been paused or used
up), the step is measured from the nearest permitted ones: a fact is not held up by the limit.

Axes: D sources.
"""

import difflib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_dynmix.mixing.strategy import Remark, Signal
from megatron_dynmix.mixing.weights import (
    Floats,
    check_weights,
    entropy,
    fit_shares,
    is_number,
    kl_divergence,
    unevenness,
)

ROUNDING_ROWS = 1
"""Rows of a capped source kept back: a blend draws less than two rows more than an interval's share of it."""
BISECTIONS = 60
"""Halvings of a line between two mixes: to less than 1e-18 of its length."""
ACTED = 1e-12
"""A smaller change of a share is rounding, not worth an event."""


@dataclass(frozen=True, eq=False)
class Guarded:
    """Weights within the limits, and what had to be done for that."""

    weights_D: Floats
    events: tuple[Remark, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Guardrails:
    """Limits on the weights; all are off by default, and what is off changes no bit.

    Attributes:
        floor: smallest share of a source that may be drawn at all.
        max_kl_step: largest KL(new || old) of one update, in nats.
        min_entropy: least entropy, as a share of that of an even mix of the sources that may be drawn,
            from 0 to 1. Whenever it acts, the mix was about to collapse: an alarm.
        prior_D: weights to pull towards.
        prior_pull: share of the prior in every new mix, from 0 to 1.
        max_epochs_D: how often each source may be drawn in full, infinity for no cap. What it may no longer
            take goes to the other sources in proportion to their weights.

    """

    floor: float = 0.0
    max_kl_step: float | None = None
    min_entropy: float | None = None
    prior_D: ArrayLike | None = None
    prior_pull: float = 0.0
    max_epochs_D: ArrayLike | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor {self.floor} is not a share; give a number from 0 to 1 / sources")
        if self.max_kl_step is not None and not self.max_kl_step > 0:
            raise ValueError(
                f"max_kl_step {self.max_kl_step} leaves no room to move; give nats > 0, or fixed weights"
            )
        if self.min_entropy is not None and not 0 <= self.min_entropy <= 1:
            raise ValueError(
                f"min_entropy {self.min_entropy} is not a share of an even mix's entropy; give 0 to 1"
            )
        if not 0 <= self.prior_pull <= 1:
            raise ValueError(f"prior_pull {self.prior_pull} is not a share; give a number from 0 to 1")
        if self.prior_pull > 0 and self.prior_D is None:
            raise ValueError(f"prior_pull {self.prior_pull} needs a prior to pull towards")

    @property
    def caps(self) -> bool:
        """Whether a source can be used up, so that weights may change though no strategy changes them."""
        return self.max_epochs_D is not None and bool(np.isfinite(np.asarray(self.max_epochs_D)).any())

    def check(self, num_sources: int) -> None:
        """Raise ValueError unless the limits can be kept for so many sources."""
        if self.floor * num_sources > 1 + 1e-12:
            raise ValueError(
                f"floor {self.floor} for {num_sources} sources adds up to {self.floor * num_sources:g}, more "
                f"than all there is; give at most {1 / num_sources:g}"
            )
        if self.prior_D is not None:
            try:
                check_weights(self.prior_D, num_sources)
            except ValueError as error:
                raise ValueError(f"prior: {error}") from None
        if self.max_epochs_D is not None:
            epochs_D = np.asarray(self.max_epochs_D, dtype=np.float64)
            if epochs_D.shape != (num_sources,) or not (epochs_D > 0).all():
                raise ValueError(
                    f"max_epochs {epochs_D.tolist()} must be a number > 0 (infinity: no cap) for each of "
                    f"{num_sources} sources"
                )

    def apply(
        self,
        old_D: Floats,
        proposed_D: Floats,
        signal: Signal,
        paused_D: NDArray[np.bool_],
        sources: Sequence[str],
    ) -> Guarded:
        """Bring proposed weights within the limits; also return a remark for each that changed something.

        A pull towards the prior is not remarked on. `old_D` are the weights in force, from which the KL step
        is measured; caps read `size_D`, `drawn_D` and `interval_rows` of the signal. It is a ValueError if no
        mix keeps the limits: all sources are paused, or their caps do not leave enough for the next interval.
        """
        most_D, events = self._most(proposed_D, signal, paused_D, sources)
        pulled_D = proposed_D
        if self.prior_pull > 0:
            pulled_D = (1 - self.prior_pull) * proposed_D + self.prior_pull * np.asarray(self.prior_D)
        target_D, more = self._permitted(pulled_D, most_D, sources)
        events += more
        if self.max_kl_step is not None:
            target_D, more = self._shortened(old_D, target_D, most_D, sources)
            events += more
        return Guarded(target_D, tuple(events))

    def _most(
        self, proposed_D: Floats, signal: Signal, paused_D: NDArray[np.bool_], sources: Sequence[str]
    ) -> tuple[Floats, list[Remark]]:
        """Return the largest share of each source: 0 if paused, what its cap leaves, or 1."""
        if paused_D.all():
            raise ValueError(f"all of {', '.join(sources)} are paused; leave at least one to be drawn")
        drawable_D = np.where(paused_D, 0.0, 1.0)
        if not self.caps:
            return drawable_D, []
        if signal.size_D is None or signal.drawn_D is None:
            raise ValueError("max_epochs needs the sources' sizes and the rows drawn so far in the signal")
        rows = signal.interval_rows
        if rows == 0:  # nothing more will be drawn: nothing can overshoot
            return drawable_D, []
        epochs_D = np.asarray(self.max_epochs_D, dtype=np.float64)
        left_D = np.clip(np.floor(epochs_D * signal.size_D) - signal.drawn_D, 0, rows) * drawable_D
        spare = left_D.sum() - rows
        if spare < 0:
            raise ValueError(
                f"max_epochs leaves {int(left_D.sum())} rows of {', '.join(sources)} for the next interval, "
                f"which draws {rows}; raise max_epochs, give more data or train for fewer iterations"
            )
        # A row of each source that can be used up in the interval is kept back, if the others can spare it.
        scarce_D = (left_D > 0) & (left_D < rows)
        kept_back = min(ROUNDING_ROWS, spare / max(scarce_D.sum(), 1))
        most_D = np.maximum(left_D - kept_back * scarce_D, 0.0) / rows
        events: list[Remark] = []
        for index, name in enumerate(sources):
            if paused_D[index] or proposed_D[index] <= most_D[index]:
                continue
            reached = signal.drawn_D[index] / signal.size_D[index]
            limit = f"share limited to {most_D[index]:.4g}" if most_D[index] > 0 else "drawn no more"
            text = f"max_epochs: {name} at {reached:.2f} of {epochs_D[index]:g} epochs, {limit}"
            events.append(Remark("max_epochs", text))
        return most_D, events

    def _permitted(
        self, weights_D: Floats, most_D: Floats, sources: Sequence[str]
    ) -> tuple[Floats, list[Remark]]:
        """Bring weights within floor and largest shares, and make them even enough."""
        events = []
        least_D = np.minimum(self.floor, most_D)
        within_D = fit_shares(weights_D, least_D, most_D)
        raised_D = (weights_D < least_D) & (within_D > weights_D + ACTED)
        if raised_D.any():
            events.append(Remark("floor", f"floor: {_names(sources, raised_D)} raised to {self.floor:g}"))
        drawable_D = most_D > 0
        if self.min_entropy is None or drawable_D.sum() < 2:
            return within_D, events
        even = math.log(drawable_D.sum())
        allowed = (1 - self.min_entropy) * even
        if unevenness(within_D[drawable_D]) <= allowed + ACTED:
            return within_D, events
        evenest_D = fit_shares(drawable_D / drawable_D.sum(), least_D, most_D)
        # Along the line to the evenest mix the entropy only rises: it is concave, with its maximum there.

        def too_uneven(share: float) -> bool:
            return unevenness(_between(within_D, evenest_D, share)[drawable_D]) > allowed

        _, enough = _bisected(too_uneven)
        even_D = _between(within_D, evenest_D, enough)
        short = ", as even as caps allow" if unevenness(even_D[drawable_D]) > allowed + ACTED else ""
        text = (
            f"entropy: {entropy(within_D):.4g} nats proposed, at least {even - allowed:.4g} wanted; mixed "
            f"with the evenest weights to {entropy(even_D):.4g}{short}"
        )
        events.append(Remark("entropy", text))
        return even_D, events

    def _shortened(
        self, old_D: Floats, target_D: Floats, most_D: Floats, sources: Sequence[str]
    ) -> tuple[Floats, list[Remark]]:
        """Go from the old weights towards the target as far as the KL limit allows."""
        assert self.max_kl_step is not None
        events: list[Remark] = []
        start_D = old_D
        back_D = (old_D == 0) & (target_D > 0)
        if back_D.any():
            # From a share of 0 every step is infinite. By symmetry with a withdrawal, which is a step of
            # -log(1 - share), what comes back may take 1 - exp(-limit) together.
            total = min(float(target_D[back_D].sum()), -math.expm1(-self.max_kl_step))
            start_D = np.where(back_D, target_D / target_D[back_D].sum() * total, old_D * (1 - total))
            text = f"kl-step: {_names(sources, back_D)} back from 0 with {total:.4g} in all"
            events.append(Remark("kl_step", text))
        start_D, _ = self._permitted(start_D, most_D, sources)
        whole = kl_divergence(target_D, start_D)
        if whole <= self.max_kl_step:
            return target_D, events
        limit = self.max_kl_step  # KL grows along the line away from its minimum at the start
        fits, _ = _bisected(lambda share: kl_divergence(_between(start_D, target_D, share), start_D) <= limit)
        text = f"kl-step: {whole:.4g} nats proposed, shortened to {limit:g}"
        return _between(start_D, target_D, fits), [*events, Remark("kl_step", text)]


def _names(sources: Sequence[str], chosen_D: NDArray[np.bool_]) -> str:
    return ", ".join(name for name, chosen in zip(sources, chosen_D, strict=True) if chosen)


def _bisected(holds: Callable[[float], bool]) -> tuple[float, float]:
    """Return the last share of a line at which a condition holds that is lost on the way, and the next."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low, high


def _between(start_D: Floats, end_D: Floats, share: float) -> Floats:
    # Not start + share * (end - start): this form cannot turn negative, nor leave the range of the two.
    return np.asarray((1 - share) * start_D + share * end_D)


@dataclass(frozen=True)
class Override:
    """The operator's word; it wins over strategy and guardrails while it stands.

    Weights are shares of the sources not paused, summing to 1; None leaves them to the strategy.
    """

    weights: Mapping[str, float] | None = None
    pause: tuple[str, ...] = ()


def parse_override(content: object, sources: Sequence[str]) -> Override:
    """Read what an override file holds: ``{"weights": {source: number}}``, ``{"pause": [source]}`` or both.

    Weights name exactly the sources that are not paused, in any unit. Refusals are one line long.
    """
    if not isinstance(content, Mapping) or not content:
        raise ValueError('an override is an object with "weights", "pause" or both, not empty')
    for key in content:
        if key not in ("weights", "pause"):
            raise ValueError(f'an override has no {key!r}; it holds "weights", "pause" or both')
    pause = _parse_pause(content.get("pause", []), sources)
    if "weights" not in content:
        if not pause:
            raise ValueError("the override pauses nothing and sets no weights; remove the file instead")
        return Override(pause=pause)
    return Override(
        weights=_parse_weights(content["weights"], [name for name in sources if name not in pause]),
        pause=pause,
    )


def _parse_pause(pause: object, sources: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(pause, list) or not all(isinstance(name, str) for name in pause):
        raise ValueError(f'"pause" is {pause!r}; give a list of source names')
    for name in pause:
        if name not in sources:
            raise ValueError(f'"pause" names {_unknown(name, sources)}')
    if len(set(pause)) < len(pause):
        raise ValueError(f'"pause" names a source twice: {pause}')
    if len(pause) == len(sources):
        raise ValueError("the override pauses every source; leave at least one to be drawn, or stop the run")
    return tuple(pause)


def _parse_weights(weights: object, drawn: Sequence[str]) -> dict[str, float]:
    if not isinstance(weights, Mapping):
        raise ValueError(f'"weights" is {weights!r}; give an object of source: number')
    for name in weights:
        if name not in drawn:
            raise ValueError(f'"weights" names {_unknown(name, drawn)}; paused sources have none')
    missing = [name for name in drawn if name not in weights]
    if missing:
        raise ValueError(f'"weights" lacks {", ".join(missing)}; name every source that is not paused')
    for name, weight in weights.items():
        if not is_number(weight) or weight < 0:
            raise ValueError(f"the weight of {name} is {weight!r:.60}; give a finite number >= 0")
    total = sum(map(float, weights.values()))
    if not 0 < total <= sys.float_info.max:
        raise ValueError(f'"weights" sum to {total}; at least one must be > 0, and the sum finite')
    return {name: weights[name] / total for name in drawn}


def _unknown(name: object, sources: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), sources, n=1)
    hint = f", did you mean {close[0]}?" if close else ""
    return f"{name!r}, which is none of {', '.join(sources)}{hint}"
