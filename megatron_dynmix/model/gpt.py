"""The model of this rank: Megatron-Core's GPT, with mixed precision and data parallelism around it.

Axes: B rows, S positions, V this rank's part of the vocabulary, F inner width of an expert, H hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.megatron import ddp_config, padded_vocab_size
from megatron_dynmix.config.rotary import TRUNCATED
from megatron_dynmix.model.layers import decoder_spec, set_latent_epsilon
from megatron_dynmix.model.scales import scale_ends
from megatron_dynmix.moe.router import GateLoadRouter
from megatron_dynmix.platform import Platform
from megatron_dynmix.platform.megatron_patches import (
    rotate_packed_rows_on_the_device,
    update_expert_bias_exactly,
)


class RealVocabularyGPT(GPTModel):
    """Megatron-Core's GPT, whose loss knows that the rows which pad the vocabulary are no tokens.

    Megatron-Core lets them take part in the softmax, so its loss, and what is learnt, depend on how far the
    vocabulary is padded, and so on the tensor-parallel size.
    """

    def __init__(self, *args: Any, real_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.real_vocab_size = real_vocab_size

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the cross entropy over the real vocabulary, `[B, S]` in nats.

        Labels are `[B, S]`, logits `[S, B, V]`; the padding's share of these is overwritten.
        """
        first = self.tp_group.rank() * logits.shape[-1]
        if first + logits.shape[-1] > self.real_vocab_size:
            # Not -inf: a fused kernel may take the difference of two logits of a rank that has only padding.
            # Past autograd: the softmax is 0 there and so is the gradient, and no copy of either is made.
            lowest = torch.finfo(logits.dtype).min
            logits.detach()[..., max(0, self.real_vocab_size - first) :] = lowest
        return super().compute_language_model_loss(labels, logits)


def build_gpt(
    config: RunConfig, transformer: TransformerConfig, transformer_engine: bool, vp_stage: int | None = None
) -> RealVocabularyGPT:
    """Build one (virtual) pipeline stage's part of the model, in the parameters' own precision."""
    spec = decoder_spec(config, transformer, transformer_engine, vp_stage)
    assert config.model.vocab_size is not None, "the preset gives one"
    gpt = RealVocabularyGPT(
        transformer,
        spec,
        real_vocab_size=config.model.vocab_size,
        vocab_size=padded_vocab_size(config),
        max_sequence_length=config.model.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=not config.model.untie_embeddings_and_output_weights,
        position_embedding_type=_positions(config, transformer),
        rotary_base=config.model.rotary_base,
        rotary_percent=config.model.rotary_percent,
        seq_len_interpolation_factor=config.model.rotary_seq_len_interpolation_factor,
        vp_stage=vp_stage,
    )
    if config.model.latent_layernorm_epsilon is not None:
        set_latent_epsilon(gpt, config.model.latent_layernorm_epsilon)
    scale_ends(gpt, config.model)
    return gpt


def _positions(config: RunConfig, transformer: TransformerConfig) -> str:
    """Return where positions come from, in Megatron-Core's words; attention by breaking sticks needs none."""
    if config.model.attention_experts is not None:
        return "none"
    return "yarn" if hasattr(transformer, TRUNCATED) else "rope"


def build_modules(
    config: RunConfig, transformer: TransformerConfig, platform: Platform
) -> Iterator[torch.nn.Module]:
    """Build this rank's chunks, one for each virtual pipeline stage, on their device: they run, untrained."""
    update_expert_bias_exactly()
    rotate_packed_rows_on_the_device()
    virtual_stages = transformer.virtual_pipeline_model_parallel_size
    for stage in range(virtual_stages) if virtual_stages else [None]:
        gpt = build_gpt(config, transformer, platform.transformer_engine, stage)
        if config.model.freeze_router:
            freeze_router(gpt)
        if transformer.add_bias_linear:
            let_expert_biases_be_added(gpt)
        gpt = gpt.to(platform.device)
        mark_experts(gpt, transformer)
        mark_whole_layers(gpt)
        yield half_precision(transformer, gpt) if config.training.bf16 else gpt


def build_model(
    config: RunConfig, transformer: TransformerConfig, platform: Platform
) -> list[DistributedDataParallel]:
    """Build this rank's chunks for training: wrapped, with gradients.

    Their hooks are given to Megatron-Core's schedules.
    """
    ddp = ddp_config(config)
    chunks: list[DistributedDataParallel] = []
    for module in build_modules(config, transformer, platform):
        # As Megatron-LM: buckets overlap a chunk's reduction with its own backward pass, and that of later
        # chunks overlaps with other chunks' passes anyway.
        chunk = DistributedDataParallel(transformer, ddp, module, disable_bucketing=bool(chunks))
        chunk.train()
        chunks.append(chunk)
    if ddp.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        interleaved = transformer.virtual_pipeline_model_parallel_size
        transformer.no_sync_func = no_sync if interleaved else no_sync[0]
        # as Megatron-LM: all stages reduce at the end, together, and no stage waits for another's reduction
        grad_sync = [chunk.start_grad_sync for chunk in chunks]
        transformer.grad_sync_func = grad_sync if interleaved else grad_sync[0]
    if ddp.align_param_gather:
        transformer.param_sync_func = [chunk.start_param_sync for chunk in chunks]
    transformer.finalize_model_grads_func = (
        finalize_without_expert_gates if config.model.freeze_expert_gate else finalize_gradients
    )
    return chunks


@contextlib.contextmanager
def whole_parameters(chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Let every rank have all parameters after the last step, and gather none inside; all ranks come here.

    With `overlap_param_gather` a step leaves each rank its own shard of them, and a module gathers the others
    when a forward pass comes to it.
    """
    # chunks that are only run are not wrapped
    gathering = [chunk for chunk in chunks if getattr(chunk, "use_forward_hook", False)]
    for chunk in gathering:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in gathering:
            chunk.enable_forward_pre_hook()


def mark_whole_layers(gpt: torch.nn.Module) -> None:
    """Tell that every tensor-parallel rank has the whole of some layers: latent attention's projections down.

    Transformer Engine marks every linear layer as divided; the gradient norm would count these once a rank.
    """
    for module in gpt.modules():
        if type(module).__name__ == "TELinear" and module.parallel_mode is None:
            for parameter in module.parameters(recurse=False):
                parameter.tensor_model_parallel = False


def let_expert_biases_be_added(gpt: torch.nn.Module) -> None:
    """Let experts without Transformer Engine be trained with biases where there is no expert parallelism.

    Megatron-Core adds an expert's bias in place, to what the sum over tensor-parallel ranks returned: with
    one of them its own input, which autograd lets nobody change. Experts with biases are never divided, so
    there is nothing to be summed.
    """
    for name, module in gpt.named_modules():
        if ".local_experts." in name and isinstance(module, RowParallelLinear):
            module.explicit_expert_comm = True


@contextlib.contextmanager
def scales_kept(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Leave what delayed scaling knows of fp8 tensors as it is: what is only measured is not trained on.

    Transformer Engine writes the largest values of every pass into its histories, from which training takes
    its scales.
    """
    kept = [(state, state.amax_history.clone(), state.scale.clone()) for state in _scaling_states(chunks)]
    try:
        yield
    finally:
        known = {id(state) for state, _, _ in kept}
        for state, amax_history, scale in kept:
            state.amax_history.copy_(amax_history)
            state.scale.copy_(scale)
        for state in _scaling_states(chunks):
            if id(state) not in known:  # made inside: as it was made
                state.amax_history.zero_()
                state.scale.fill_(1.0)


def _scaling_states(chunks: Sequence[torch.nn.Module]) -> list[Any]:
    """Return what delayed scaling keeps of each layer of Transformer Engine."""
    metas = [getattr(module, "fp8_meta", {}) for chunk in chunks for module in chunk.modules()]
    states = [meta.get(name) for meta in metas for name in ("scaling_fwd", "scaling_bwd")]
    return [state for state in states if hasattr(state, "amax_history")]


def half_precision(transformer: TransformerConfig, gpt: torch.nn.Module) -> Float16Module:
    """Cast the parameters of a model, but no buffer: those hold what routers count, or sum up in small steps.

    Megatron-Core casts both, and later makes expert biases float32 again, rounded and in other storage.
    """
    buffers = [(module, dict(module._buffers)) for module in gpt.modules()]
    wrapped = Float16Module(transformer, gpt)
    for module, before in buffers:
        module._buffers.update(before)
    return wrapped


def mark_experts(gpt: torch.nn.Module, transformer: TransformerConfig) -> None:
    """Say which ranks hold the same part of an expert: its gradient is summed there, and once in the norm.

    Where only the tensor-parallel size of experts differs from that of the rest, Megatron-Core takes the
    data-parallel ranks for those; and grouped experts do not tell that tensor-parallel ranks hold others.
    """
    own_layout = transformer.expert_tensor_parallel_size != transformer.tensor_model_parallel_size
    for name, parameter in gpt.named_parameters():
        if ".experts." in name:
            parameter.allreduce = not (own_layout or transformer.expert_model_parallel_size > 1)
            parameter.tensor_model_parallel = True
            # what Megatron-Core says of the bias of any row-parallel layer: it would be summed once more
            parameter.sequence_parallel = False


def unwrap(model: torch.nn.Module) -> GPTModel:
    """Return the GPT inside its wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model


def freeze_router(model: torch.nn.Module) -> None:
    """Keep every router's weights as they are; experts and all else are trained."""
    for module in model.modules():
        if isinstance(module, GateLoadRouter):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)


def finalize_gradients(
    chunks: list[DistributedDataParallel], num_tokens: torch.Tensor, **kwargs: Any
) -> None:
    """Run Megatron-Core's `finalize_model_grads`, and divide by the trained tokens of the step here.

    It would ask of each chunk whether there were any, which waits for the whole backward pass.
    """
    finalize_model_grads(chunks, **kwargs)
    last_stage = parallel_state.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast(
        num_tokens, last_stage, group=parallel_state.get_pipeline_model_parallel_group()
    )
    ranks = parallel_state.get_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(num_tokens, group=ranks)
    for chunk in chunks:
        chunk.scale_gradients(1.0 / num_tokens.clamp(min=1))


def finalize_without_expert_gates(chunks: list[DistributedDataParallel], *args: Any, **kwargs: Any) -> None:
    """Finalize gradients, then take gate projections of experts their gradient.

    Here, and not in a hook of the parameter: fused kernels add to `main_grad` past autograd. With no gradient
    and no weight decay AdamW leaves a weight as it is, and the gradient's norm is that of what is trained.
    """
    finalize_gradients(chunks, *args, **kwargs)
    for name, parameter in (item for chunk in chunks for item in chunk.named_parameters()):
        if ".experts." in name and ".linear_fc1.weight" in name:
            # a rank's part is `[2F, H]`: the gate's rows, then as many of the up projection
            parameter.main_grad[: parameter.shape[0] // 2].zero_()
