"""Logits and gradients of Hugging Face folders in a layout, held against those of another implementation.

Axes: B rows, S positions, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import yaml

from megatron_dynmix.checkpoint.tensors import Tensors
from tests.distributed import convert_programs
from tests.distributed.ranks import run_ranks


def check_folders(
    layout: tuple[int, Sequence[str]],
    folders: Mapping[str, Path],
    expected: Mapping[str, tuple[np.ndarray, Tensors]],
    rows_BS: torch.Tensor,
    tmp_path: Path,
) -> None:
    """Run every model forward and backward, and compare at 1e-4.

    Args:
        layout: number of ranks, and flags.
        folders: name -> folder.
        expected: name -> logits `[B, S, V]`, and gradients under the names of a checkpoint.
        rows_BS: rows of one position more than are trained on.
        tmp_path: an empty folder.

    """
    ranks, flags = layout
    settings = {
        "model": {"moe_aux_loss_coeff": 0.0},
        "parallel": {"use_distributed_optimizer": False},
        "data": {"seq_length": rows_BS.shape[1] - 1},
        "training": {"micro_batch_size": 1, "global_batch_size": len(rows_BS), "train_iters": 1},
    }
    (tmp_path / "RUN.yaml").write_text(yaml.safe_dump(settings))
    program = convert_programs.logits_and_gradients
    answers = run_ranks(ranks, program, tmp_path / "RUN.yaml", folders, flags, rows_BS)
    # TP ranks hold parts of the vocabulary, EP ranks rows, and of pipeline stages the last holds all
    axis = -1 if "--tensor-model-parallel-size" in flags else 0
    for name, (logits_BSV, gradients) in expected.items():
        seen = [answer[name] for answer in answers]
        parts = [np.stack([row for _, row in rank["logits"]]) for rank in seen if rank["logits"]]
        ours_BSV = np.concatenate(parts, axis)[..., : logits_BSV.shape[-1]]
        np.testing.assert_allclose(ours_BSV, logits_BSV, atol=1e-4, err_msg=name)
        for key, offset, gradient in (entry for rank in seen for entry in rank["gradients"]):
            if not key.endswith("expert_bias"):  # which is not learnt by gradients
                wanted = gradients.read(key, offset, gradient.shape).numpy()
                np.testing.assert_allclose(gradient, wanted, atol=1e-4, err_msg=f"{name}: {key}")
        assert {key for rank in seen for key, _, _ in rank["gradients"]} == gradients.shapes.keys(), name
