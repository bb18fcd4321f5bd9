"""What the operator of a running job says about its mix: weights, or sources to pause."""

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Override:
    """The operator's word; it wins over strategy and guardrails while it stands.

    Attributes:
        weights: share of every source that is not paused, summing to 1; None leaves that to the strategy.
        pause: sources not to be drawn.

    """

    weights: Mapping[str, float] | None = None
    pause: tuple[str, ...] = ()


def parse_override(content: object, sources: Sequence[str]) -> Override:
    """Read what an override file holds: ``{"weights": {source: number}}``, ``{"pause": [source]}`` or both.

    Args:
        content: the parsed JSON.
        sources: the run's sources. Weights name exactly those of them that are not paused, in any unit.

    Raises:
        ValueError: anything else, said in one line.

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
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 <= weight <= sys.float_info.max:  # NaN is refused too
            raise ValueError(f"the weight of {name} is {weight!r}; give a finite number >= 0")
    total = sum(map(float, weights.values()))
    if not 0 < total <= sys.float_info.max:
        raise ValueError(f'"weights" sum to {total}; at least one must be > 0, and the sum finite')
    return {name: weights[name] / total for name in drawn}


def _unknown(name: object, sources: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), sources, n=1)
    hint = f", did you mean {close[0]}?" if close else ""
    return f"{name!r}, which is none of {', '.join(sources)}{hint}"
