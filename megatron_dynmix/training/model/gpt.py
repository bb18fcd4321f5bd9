"""The model of this rank: Megatron-Core's GPT, mixed precision and data parallelism around it."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.megatron import ddp_config, padded_vocab_size
from megatron_dynmix.moe.router import GateLoadRouter
from megatron_dynmix.platform import Platform
from megatron_dynmix.training.model.layer_spec import decoder_spec


def build_gpt(
    config: RunConfig, transformer: TransformerConfig, transformer_engine: bool, vp_stage: int | None = None
) -> GPTModel:
    """Build one (virtual) pipeline stage's part of the model, in the parameters' own precision."""
    spec = decoder_spec(
        transformer,
        transformer_engine=transformer_engine,
        qk_layernorm_full_width=config.model.qk_layernorm_full_width,
        vp_stage=vp_stage,
    )
    return GPTModel(
        transformer,
        spec,
        vocab_size=padded_vocab_size(config),
        max_sequence_length=config.model.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=not config.model.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=config.model.rotary_base,
        vp_stage=vp_stage,
    )


def build_model(
    config: RunConfig, transformer: TransformerConfig, platform: Platform
) -> list[DistributedDataParallel]:
    """The model ready to train: on its device, wrapped, its hooks given to the schedules.

    Returns:
        This rank's chunks: one, or one for each virtual pipeline stage.

    """
    virtual_stages = transformer.virtual_pipeline_model_parallel_size
    stages = range(virtual_stages) if virtual_stages else [None]
    ddp = ddp_config(config)
    chunks: list[DistributedDataParallel] = []
    for stage in stages:
        gpt = build_gpt(config, transformer, platform.transformer_engine, stage)
        if config.model.freeze_router:
            freeze_router(gpt)
        gpt = gpt.to(platform.device)
        module = Float16Module(transformer, gpt) if config.training.bf16 else gpt
        # As Megatron-LM: buckets overlap a chunk's reduction with its own backward pass, and that of later
        # chunks overlaps with other chunks' passes anyway.
        chunk = DistributedDataParallel(transformer, ddp, module, disable_bucketing=bool(chunks))
        chunk.train()
        chunks.append(chunk)
    if ddp.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        transformer.no_sync_func = no_sync if virtual_stages else no_sync[0]
    transformer.finalize_model_grads_func = finalize_model_grads
    return chunks


def unwrap(model: torch.nn.Module) -> GPTModel:
    """The GPT inside its wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model


def freeze_router(model: torch.nn.Module) -> None:
    """Keep every router's weights as they are; experts and all else go on learning."""
    for module in model.modules():
        if isinstance(module, GateLoadRouter):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
