"""A script of the kind that people keep in their forks, for Megatron-Core 0.18 and later.

Written from the public interface of `megatron.training`. MIXED=1 is the two-line diff of the guide.
"""

import os
from functools import partial

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

if os.environ.get("MIXED"):
    from megatron_dynmix.stock import mixed

    pretrain = mixed(pretrain)

KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
UNUSED = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group")


def get_batch(data_iterator, vp_stage):
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(KEYS)
    args, tp_rank = get_args(), mpu.get_tensor_model_parallel_rank()
    batch = {}
    if tp_rank == 0:
        read = next(data_iterator)
        batch = {key: read[key].cuda() if read.get(key) is not None else None for key in (*KEYS, *UNUSED)}
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    return get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group(), hybrid_cp_group_func=None
    )


def loss_func(loss_mask, token_loss):
    loss_mask = loss_mask.reshape(-1).float()
    loss = (token_loss.reshape(-1).float() * loss_mask).sum()
    tokens = loss_mask.sum().to(torch.int)
    args, check = get_args(), get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        check.validate_result(loss, torch.isnan, "the loss is NaN", fatal=True)
    if args.check_for_spiky_loss:
        is_spiky = partial(check.is_unexpectedly_large, threshold=10, context="loss")
        check.validate_result(loss, is_spiky, "the loss is spiky", fatal=False)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}


def forward_step(data_iterator, model):
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    token_loss = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return token_loss, partial(loss_func, batch["loss_mask"])


def is_built_here(vp_stage):
    return mpu.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage)


def datasets_provider(sizes, vp_stage=None):
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, partial(is_built_here, vp_stage), config).build()


if __name__ == "__main__":
    datasets_provider.is_distributed = True
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "NullTokenizer"})
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)
