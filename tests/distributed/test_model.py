"""The model on one rank: packed rows, every preset's shape, padding. Axes: B rows, S positions."""

import os

import numpy as np
import pytest
import torch

from megatron_dynmix.config.presets import PRESETS
from tests.distributed import programs
from tests.distributed.conftest import quick_or_slow
from tests.distributed.ranks import run_ranks

EP1 = ["--expert-model-parallel-size", "1"]
SIZES = [*("--num-layers", "2", "--hidden-size", "32", "--ffn-hidden-size", "48", "--vocab-size", "1024")]


def packed_and_apart(run_yaml, flags, run_dir):
    """Loss and gradients of one packed row, and of its examples run one by one in rows of their own."""
    trainer = programs.build(run_yaml, flags, run_dir)
    rows = trainer.loader.sources[1]
    row = max(range(len(rows)), key=lambda index: rows[index]["segment_ids"].max())
    packed = rows[row]
    apart = [_alone(packed, segment) for segment in range(packed["segment_ids"].max() + 1)]
    return {
        "segments": len(apart),
        "packed": _loss_and_gradients(trainer, [packed]),
        "apart": _loss_and_gradients(trainer, apart),
    }


def _alone(packed, segment):
    """One segment at the start of a row of its own."""
    here = packed["segment_ids"] == segment
    row = {name: np.zeros_like(values) for name, values in packed.items()}
    row["padding_mask"][:], row["segment_ids"][:] = True, -1
    for name, values in packed.items():
        row[name][: here.sum()] = values[here]
    row["segment_ids"][: here.sum()] = 0
    return row


def _loss_and_gradients(trainer, rows):
    batches = [
        {name: torch.tensor(array)[None] for name, array in {"dataset_id": 1, "half": 0, **row}.items()}
        for row in rows
    ]
    trainer.run.chunks[0].zero_grad_buffer()
    stats = trainer.run(batches, forward_only=False)
    gradients = [parameter.main_grad.clone() for parameter in trainer.run.chunks[0].parameters()]
    return stats.lm_loss, torch.cat([gradient.flatten() for gradient in gradients]).numpy()


@pytest.mark.parametrize("stages", [1, 3], ids=["one pipeline stage", "with a middle pipeline stage"])
def test_I9_a_packed_row_equals_its_examples_run_one_by_one(stages, run_yaml, start_from, tmp_path):
    pipeline = ["--pipeline-model-parallel-size", str(stages)]
    flags = [*start_from, *EP1, *pipeline, "--moe-aux-loss-coeff", "0"]
    for result in run_ranks(stages, packed_and_apart, run_yaml, flags, tmp_path):
        assert result["segments"] > 1
        (packed_loss, packed_gradient), (loss, gradient) = result["packed"], result["apart"]
        assert np.abs(gradient).max() > 1e-3
        np.testing.assert_allclose(packed_loss, loss, rtol=1e-5)
        np.testing.assert_allclose(packed_gradient, gradient, atol=1e-5)


def packed_and_apart_without_a_mask_on_the_middle_stage(run_yaml, flags, run_dir):
    """The same with a fault: the middle pipeline stage is not told of segments."""
    from megatron_dynmix.training import batch

    segment_mask = batch.segment_mask
    is_middle = int(os.environ["RANK"]) == 1
    batch.segment_mask = lambda *arguments: None if is_middle else segment_mask(*arguments)
    return packed_and_apart(run_yaml, flags, run_dir)


def test_a_middle_pipeline_stage_that_ignored_segments_would_be_seen(run_yaml, start_from, tmp_path):
    flags = [*start_from, *EP1, "--pipeline-model-parallel-size", "3", "--moe-aux-loss-coeff", "0"]
    program = packed_and_apart_without_a_mask_on_the_middle_stage
    first, middle, last = run_ranks(3, program, run_yaml, flags, tmp_path)
    for result in (first, middle, last):
        assert np.abs(result["packed"][1] - result["apart"][1]).max() > 1e-4


def joined_and_masked(run_yaml, flags, run_dir):
    """Logits' loss per token with the block-diagonal mask, and with rows joined to one sequence."""
    from megatron_dynmix.data.loader import segment_borders
    from megatron_dynmix.model.gpt import unwrap
    from megatron_dynmix.training.batch import to_batch

    trainer = programs.build(run_yaml, flags, run_dir)
    model = unwrap(trainer.run.chunks[0]).eval()
    micro_batch = trainer.loader.step(0, 1)[0]
    most_segments = max(rows.packed.most_segments for rows in trainer.loader.sources)
    micro_batch["cu_seqlens"] = segment_borders(micro_batch["segment_ids"], most_segments)
    answers = []
    for join_rows in (False, True):
        batch = to_batch(micro_batch, torch.device("cpu"), join_rows=join_rows)
        with torch.no_grad():
            loss = batch.token_losses(model)
        answers.append((loss.reshape(-1) * batch.loss_mask.reshape(-1)).numpy())
        source_T, half_T, trained_T = batch.routed_T(sequence_parallel=False)
        assert source_T.shape == half_T.shape == trained_T.shape == (batch.tokens.numel(),)
        assert (source_T >= 0).sum() == (~batch.padding_mask).sum()
        assert trained_T.sum() == batch.loss_mask.sum() and (source_T[trained_T] >= 0).all()
    return answers


def test_rows_joined_to_one_sequence_give_the_losses_of_rows_with_a_mask(run_yaml, start_from, tmp_path):
    masked, joined = run_ranks(1, joined_and_masked, run_yaml, [*start_from, *EP1], tmp_path)[0]
    np.testing.assert_allclose(joined, masked, atol=1e-5)


ONE_OF_EACH_FAMILY = {
    *("mixtral-8x7b", "qwen3-30b-a3b", "qwen1.5-moe-a2.7b", "olmoe-1b-7b", "llama-moe-3.5b-4-16"),
}


@pytest.mark.parametrize("preset", quick_or_slow(sorted(PRESETS), ONE_OF_EACH_FAMILY))
def test_preset_trains_when_made_small(preset, run_yaml, tmp_path):
    shape = PRESETS[preset]
    heads = ["--num-attention-heads", "4", "--num-query-groups", "2", "--num-experts", "8"]
    width = ["--kv-channels", "16"] if "kv_channels" in shape else []
    experts = ["--moe-ffn-hidden-size", "24"] if "moe_ffn_hidden_size" in shape else []
    topk = ["--moe-router-topk", str(min(shape["moe_router_topk"], 4))]
    flags = [
        *("--preset", preset, *SIZES, *heads, *width, *experts, *topk, *EP1),
        *(
            "--probe-tokens",
            "256",
            "--train-iters",
            "2",
            "--interval",
            "1",
            "--log-interval",
            "1",
            "--num-workers",
            "0",
        ),
        *("--micro-batch-size", "2", "--global-batch-size", "4", "--lr", "1e-2", "--lr-warmup-iters", "0"),
    ]
    result = run_ranks(1, programs.train, run_yaml, flags, tmp_path)[0]
    assert len(result["mixing"]) == 2
    assert all(np.isfinite(record["lm_loss"]) for record in result["metrics"])


VARIANTS = [
    "--moe-router-enable-expert-bias --moe-router-score-function=sigmoid",
    "--moe-z-loss-coeff=1e-3",
    "--moe-shared-expert-intermediate-size=32",
    "--moe-router-load-balancing-type=seq_aux_loss",
    "--num-layers=4 --moe-layer-freq=[0,1,0,1] --layers=all",
    "--bf16",
    "--signal=train --metric=cos --aggregate=max",
]


@pytest.mark.parametrize("variant", quick_or_slow(VARIANTS, {VARIANTS[0], VARIANTS[4], "--bf16"}))
def test_variant_of_model_and_mixing_runs(variant, run_yaml, start_from, tmp_path):
    begin = start_from[: start_from.index("--pretrained-checkpoint")]
    result = run_ranks(2, programs.train, run_yaml, [*begin, *variant.split()], tmp_path)[0]
    assert len(result["mixing"]) == 2
    assert all(np.isfinite(record["lm_loss"]) for record in result["metrics"])
    for record in result["mixing"]:
        assert abs(sum(record["new_weights"]) - 1) < 1e-9
        load = np.array(record["load"])
        assert load.shape == ((4, 2, 8) if "all" in variant else (4, 8))
        np.testing.assert_allclose(load.reshape(4, -1).sum(axis=1), 1)
