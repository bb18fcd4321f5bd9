"""The paper's rule with sentence embeddings in place of gate loads, applied once.

Axes: D sources, V dimensions of an embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.aggregate import source_delta
from megatron_dynmix.mixing.distance import cosine_distance, l2_distance
from megatron_dynmix.mixing.strategy import Proposal, Signal
from megatron_dynmix.mixing.update import check_step_size, reweight

EMBEDDING_DISTANCES = {"l2": l2_distance, "cos": cosine_distance}
"""Distances that mean something for vectors of any sign; the others of `DISTANCES` want shares."""


@dataclass(frozen=True, kw_only=True)
class SentenceEmbedding:
    """Static weights from one embedding per source, by one update of Zhu et al. (2025), Algorithm 1.

    The SentEmb baseline of section 4: mean distance to the other sources' embeddings, softmax of
    log w + eta times that, smoothed by c; then the weights stay. The embeddings are used as given; the paper
    does not name its encoder.

    Attributes:
        embeddings_DV: one vector per source, in the order of the sources; usually the mean over its examples.
        eta: step size >= 0.
        smoothing: c, the share spread evenly over the sources, from 0 to 1.
        metric: distance between embeddings: ``l2`` or ``cos``.

    Raises:
        ValueError: on construction, for embeddings that are no finite matrix, or an option out of range.

    """

    embeddings_DV: Sequence[Sequence[float]]
    eta: float = 10.0
    smoothing: float = 0.05
    metric: str = "l2"

    name: ClassVar[str] = "sent-emb"
    needs_gate_load: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    starts: ClassVar[bool] = True
    updates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_step_size(self.eta, self.smoothing)
        if self.metric not in EMBEDDING_DISTANCES:
            raise ValueError(
                f"metric {self.metric!r} cannot compare embeddings; give one of {sorted(EMBEDDING_DISTANCES)}"
            )
        try:
            vectors_DV = np.asarray(self.embeddings_DV, dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError("the embeddings are not number vectors of one length, one per source") from None
        if vectors_DV.ndim != 2 or not np.isfinite(vectors_DV).all():
            raise ValueError(
                f"the embeddings have shape {vectors_DV.shape}; give one finite vector per source"
            )

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Embeddings -> distances -> deltas -> weights; to be asked once, for it starts and never updates.

        Raises:
            ValueError: embeddings of another number of sources.

        """
        if len(self.embeddings_DV) != len(weights_D):
            raise ValueError(
                f"{len(self.embeddings_DV)} embeddings for {len(weights_D)} sources; give one each"
            )
        distance_DD = EMBEDDING_DISTANCES[self.metric](np.asarray(self.embeddings_DV, dtype=np.float64))
        delta_D = source_delta(distance_DD, "mean")
        new_D = reweight(weights_D, delta_D, eta=self.eta, smoothing=self.smoothing)
        return Proposal(weights_D=new_D, delta_D=delta_D, distance_DD=distance_DD)
