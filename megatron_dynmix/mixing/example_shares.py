"""What a weight is a share of: of the examples drawn (the paper's meaning), or of the rows drawn.

A row is what the blend draws, and all rows are equally long: a share of the rows is a share of the tokens,
padding included. Sources differ in how many examples one of their rows holds. Axes: D sources.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.strategy import Proposal, Signal, Strategy
from megatron_dynmix.mixing.weights import check_weights


def row_shares(
    weights_D: NDArray[np.float64], examples_per_row_D: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Shares of the rows that give shares `weights_D` of the examples.

    A row of source i brings n_i examples on average, so r_i = (w_i / n_i) / sum_j (w_j / n_j). Exact over
    whole epochs, in which every example is drawn once; within an epoch, as even as the rows are.

    Args:
        weights_D: shares of the examples, summing to 1; 0 pauses a source.
        examples_per_row_D: mean number of examples in a row of each source, 1 or more.

    Returns:
        Shares of the rows, summing to 1; those of equal `examples_per_row_D` are `weights_D`, bit for bit.

    Raises:
        ValueError: weights that are no shares, other lengths, or fewer than one example per row.

    """
    return _reweighted(weights_D, examples_per_row_D, -1)


def example_shares(
    row_weights_D: NDArray[np.float64], examples_per_row_D: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Shares of the examples in rows drawn with shares `row_weights_D`: the inverse of `row_shares`."""
    return _reweighted(row_weights_D, examples_per_row_D, 1)


@dataclass(frozen=True, eq=False)
class InExamples:
    """A strategy that reckons in examples, for a run that reckons in rows.

    It is given weights, sizes and draws in examples, and what it proposes is turned into shares of the rows;
    to all others it is a strategy like any other.

    Attributes:
        strategy: whose weights are shares of the examples.
        examples_per_row_D: mean number of examples in a row of each source.

    """

    strategy: Strategy
    examples_per_row_D: NDArray[np.float64]

    @property
    def name(self) -> str:
        """The strategy's."""
        return self.strategy.name

    @property
    def needs_gate_load(self) -> bool:
        """The strategy's."""
        return self.strategy.needs_gate_load

    @property
    def needs_loss(self) -> bool:
        """The strategy's."""
        return self.strategy.needs_loss

    @property
    def needs_halves(self) -> bool:
        """The strategy's; False where it does not say."""
        return bool(getattr(self.strategy, "needs_halves", False))

    @property
    def layers(self) -> Any:
        """The strategy's; all where it does not say."""
        return getattr(self.strategy, "layers", "all")

    @property
    def starts(self) -> bool:
        """The strategy's."""
        return self.strategy.starts

    @property
    def updates(self) -> bool:
        """The strategy's."""
        return self.strategy.updates

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Ask it in examples; shares of rows in and out."""
        per_row_D = self.examples_per_row_D
        shares_D = example_shares(weights_D, per_row_D)
        proposal = self.strategy.propose(shares_D, in_examples(signal, weights_D, per_row_D), state)
        return replace(proposal, weights_D=row_shares(proposal.weights_D, per_row_D))


def in_examples(
    signal: Signal, row_weights_D: NDArray[np.float64], examples_per_row_D: NDArray[np.float64]
) -> Signal:
    """Sizes, draws and what is still to be drawn counted in examples instead of rows.

    How many examples so many rows will bring is reckoned at the weights in force: it depends on those that
    are still to be found.
    """
    mean = float(row_weights_D @ examples_per_row_D)
    return replace(
        signal,
        interval_rows=round(signal.interval_rows * mean),
        run_rows=round(signal.run_rows * mean),
        size_D=_examples(signal.size_D, examples_per_row_D),
        drawn_D=_examples(signal.drawn_D, examples_per_row_D),
    )


def _examples(rows_D: NDArray[np.int64] | None, per_row_D: NDArray[np.float64]) -> NDArray[np.int64] | None:
    return None if rows_D is None else np.rint(rows_D * per_row_D).astype(np.int64)


def _reweighted(
    weights_D: NDArray[np.float64], examples_per_row_D: NDArray[np.float64], power: int
) -> NDArray[np.float64]:
    weights_D = check_weights(weights_D, len(weights_D))
    if examples_per_row_D.shape != weights_D.shape:
        raise ValueError(
            f"examples per row have shape {examples_per_row_D.shape}; need one for each of "
            f"{len(weights_D)} sources"
        )
    # every row holds at least one example; NaN is refused too
    if not (np.isfinite(examples_per_row_D) & (examples_per_row_D >= 1)).all():
        raise ValueError(f"examples per row {examples_per_row_D.tolist()} must be finite, and 1 or more")
    if (examples_per_row_D == examples_per_row_D[0]).all():
        return weights_D
    scaled_D = weights_D * examples_per_row_D**power
    return np.asarray(scaled_D / scaled_D.sum())
