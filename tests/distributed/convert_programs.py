"""What the ranks of the conversion's tests run. Axes: B rows, S positions, V vocabulary."""

from unittest.mock import Mock

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_dynmix import platform
from megatron_dynmix.checkpoint.checkpointer import Checkpointer
from megatron_dynmix.checkpoint.folder import TRACKER, folder_of
from megatron_dynmix.config.load import load_config
from megatron_dynmix.convert import export_hf
from megatron_dynmix.convert.import_hf import folder_for, weights_of
from megatron_dynmix.errors import TrainingStopped
from megatron_dynmix.model.gpt import unwrap
from megatron_dynmix.moe.counter import reduce_counts
from megatron_dynmix.training import run as training_run
from megatron_dynmix.training.batch import to_batch
from megatron_dynmix.training.trainer import seed_iteration
from tests.distributed import programs
from tests.distributed.layouts import start_anew


def logits_and_gradients(run_yaml, folders, flags, tokens_BS, segment_BS=None):
    """Of each model, in one job: this rank's part of the logits and of the gradients, and all gate loads.

    Args:
        run_yaml: a file whose `global_batch_size` is the number of rows.
        folders: name -> folder of a Hugging Face model, or of one that was converted from it.
        flags: the layout.
        tokens_BS: rows of one position more than are trained on.
        segment_BS: their segments, one in each row if not given.

    """
    answers = {}
    for name, folder in folders.items():
        start_anew()
        converted = (folder / TRACKER).is_file()
        config = load_config(run_yaml, ["--preset" if converted else "--load-hf", str(folder), *flags])
        training_run.join_job(config)
        seed_iteration(config.training.seed, -1)
        runner = training_run.build_runner(config, 1, platform.start())
        checkpointer = Checkpointer(
            directory=folder, chunks=runner.chunks, optimizer=Mock(), scheduler=Mock()
        )
        if converted:
            _give_extra_state(runner)
            checkpointer.load_weights(folder_of(folder, 0))
        else:
            checkpointer.load_tensors(weights_of(folder_for(folder, config), config))
        segments = [None] * len(tokens_BS) if segment_BS is None else segment_BS.unsqueeze(1)
        batches = [_batch(row_S[None], segments[number]) for number, row_S in _own_rows(tokens_BS)]
        logits = _logits(runner, batches)
        for chunk in runner.chunks:
            chunk.zero_grad_buffer()
        with runner.counter.recording():
            stats = runner(batches, forward_only=False)
        answers[name] = {
            "logits": logits,
            "loss": stats.lm_loss,
            "counts_HDLE": reduce_counts(runner.counter.take()).cpu().numpy(),
            "gradients": programs.gradients_of(runner.chunks),
        }
    return answers


def _give_extra_state(runner):
    """Let a module keep something that is no tensor, as Transformer Engine's do and no conversion writes."""
    norm = unwrap(runner.chunks[0]).decoder.layers[0].pre_mlp_layernorm
    extra = {"get_extra_state": lambda self: torch.zeros(1), "set_extra_state": lambda self, state: None}
    norm.__class__ = type("NormWithExtraState", (type(norm),), extra)


def there_and_back(run_yaml, flags, run_dir, source, tokens_BS):
    """A run from a folder; the run goes on without the folder; then a rank cannot write its share.

    Returns:
        Logits after the run and after it went on; what the failure is told as.

    """
    export_hf.SHARD_BYTES = 50_000  # so that every rank has files to write

    def train(config_yaml, *more, resume):
        start_anew()
        config = load_config(config_yaml, [*flags, *more])
        trainer = programs.train_from(config, run_dir, resume=resume)
        return _logits(trainer.run, [_batch(row_S[None]) for row_S in tokens_BS])

    begun = train(run_yaml, "--train-iters", "2", "--save-hf", "every", resume="no")
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        source.rename(source.with_name("gone"))
    torch.distributed.barrier()
    resolved = run_dir / "config.yaml"
    resumed = train(resolved, "--train-iters", "4", "--save-hf", "end", resume="must")
    if torch.distributed.get_rank() == 1:
        export_hf.write_shard = _disk_full
    try:
        train(resolved, "--train-iters", "5", resume="must")
    except TrainingStopped as stopped:
        return begun, resumed, str(stopped)
    return begun, resumed, None


def trained(run_yaml, flags, run_dir, tokens_BS):
    """Of a whole run: this rank's part of the logits of its last state."""
    trainer = programs.train_from(load_config(run_yaml, flags), run_dir)
    return {"logits": _logits(trainer.run, [_batch(row_S[None]) for row_S in tokens_BS])}


def _disk_full(*args):
    raise OSError(28, "No space left on device")


def _own_rows(tokens_BS):
    rank, count = parallel_state.get_data_parallel_rank(), get_num_microbatches()
    return list(enumerate(tokens_BS))[rank * count : (rank + 1) * count]


def _batch(tokens_BS, segment_BS=None):
    """Rows without padding, of one segment if not given, one after the other from source 0."""
    inputs_BS = tokens_BS[:, :-1]
    rows, length = inputs_BS.shape
    return {
        "tokens": inputs_BS,
        "labels": tokens_BS[:, 1:],
        "position_ids": torch.arange(length).expand(rows, -1),
        "loss_mask": torch.ones(rows, length),
        "segment_ids": torch.zeros(rows, length, dtype=torch.long) if segment_BS is None else segment_BS,
        "padding_mask": torch.zeros(rows, length, dtype=torch.bool),
        "dataset_id": torch.zeros(rows, dtype=torch.long),
        "half": torch.zeros(rows, dtype=torch.long),
    }


def _logits(runner, batches):
    """[(first column, logits of a row)] of the rows of this rank; none but on the last stage."""

    def forward_step(iterator, model):
        batch = to_batch(next(iterator), torch.device("cpu"), join_rows=False)
        runner.counter.set_sources(*batch.routed_T(runner.sequence_parallel))
        output = model(
            batch.tokens, batch.position_ids, batch.attention_mask, padding_mask=batch.padding_mask
        )
        return output, lambda logits_BSV, non_loss_data: logits_BSV

    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=runner.chunks[0],
        num_microbatches=len(batches),
        seq_length=runner.seq_length,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    return [
        (tensor_rank * logits_BSV.shape[-1], logits_BSV.detach()[0].numpy())
        for logits_BSV in found
        if parallel_state.is_pipeline_last_stage()
    ]
