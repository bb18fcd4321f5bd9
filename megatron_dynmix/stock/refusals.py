"""What of Megatron-LM cannot run with mixing, refused by name before a model is built."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from megatron_dynmix.config.check.mixing import check_strategies
from megatron_dynmix.config.megatron_fields import moe_layers
from megatron_dynmix.config.run_config import MixingConfig
from megatron_dynmix.errors import InputError
from megatron_dynmix.stock.flags import spelled, value_of
from megatron_dynmix.stock.sources import Blend
from megatron_dynmix.training.mix import check_mixing
from megatron_dynmix.training.mix_setup import resolve_files

REFUSED: Mapping[str, str] = {
    "full_validation": "it needs the length of a validation set, which an iterator has not; leave it out",
    "multiple_validation_sets": "it needs --full-validation; leave it out, --dynmix-source-loss tells losses "
    "of each source",
    "overlap_moe_expert_parallel_comm": "layers would run after the micro-batch's sources were announced; "
    "leave it out",
    "delay_wgrad_compute": "it comes with --overlap-moe-expert-parallel-comm; leave it out",
    "hybrid_context_parallel": "rows would be cut up between ranks in a way that the counting cannot follow; "
    "use --context-parallel-size alone",
    "perform_rl_step": "rollouts are drawn from no blend; leave it out",
    "mock_data": "there are no sources to mix; give --data-path",
    "fim_data": "its dataset cuts rows up again with random numbers of its own; leave it out",
    "phase_transition_iterations": "it begins the blend anew; give a --dynmix-schedule instead",
    "decrease_batch_size_if_needed": "the batch would depend on the ranks, and updates on the batch; give a "
    "--global-batch-size that the ranks divide",
    "dataloader_save": "the order of the samples is in the checkpoint already; leave it out",
    "use_megatron_fsdp": "the mix was never tried in its checkpoints; use --use-distributed-optimizer",
    "use_torch_fsdp2": "the mix was never tried in its checkpoints; use --use-distributed-optimizer",
    "use_legacy_models": "these models have no router that counts; leave it out",
    "enable_cuda_graph": "a captured graph would not run the router's counting; leave it out",
    "external_cuda_graph": "a captured graph would not run the router's counting; leave it out",
    "moe_router_force_load_balancing": "random routing says nothing about the data; leave it out",
    "moe_enable_routing_replay": "the routers would repeat what they once chose; leave it out",
    "rl_use_sequence_packing": "rollouts are drawn from no blend; leave it out",
}
"""Flags that may not be given -> why, and what to do."""


def check_flags(args: Namespace) -> None:
    """Refuse the first flag that mixing cannot work with."""
    for flag, why in REFUSED.items():
        if value_of(args, flag):
            raise InputError(f"{spelled(flag)} does not go with mixing: {why}")
    graphs = value_of(args, "cuda_graph_impl")
    if graphs not in (None, "none"):
        raise InputError(
            f"--cuda-graph-impl is {graphs}; a captured graph would not run the router's counting: use none"
        )
    kind = value_of(args, "dataloader_type")
    if kind not in (None, "single"):
        raise InputError(
            f"--dataloader-type is {kind}; mixing gives the iterator of the training data itself, in "
            "the order of the blend: use single"
        )
    if hasattr(args, "step_batch_size_schedule") and value_of(args, "rampup_batch_size"):
        raise InputError(
            "--rampup-batch-size is accepted and ignored by this version of Megatron-LM; give "
            "--step-batch-size-schedule instead"
        )
    if (value_of(args, "gtp_weight_remat_size") or 1) > 1:
        raise InputError(
            "--gtp-weight-remat-size above 1 makes ranks that the sum of gate loads does not know; use 1"
        )
    _check_packed(args)


def _check_packed(args: Namespace) -> None:
    """Refuse options of packed rows where there are none, and layouts that packed rows cannot have."""
    packed, joined = args.dynmix_packed_rows, value_of(args, "transformer_impl") != "local"
    if not packed:
        for flag in ("dynmix_padding_mask", "dynmix_packed_attention"):
            if value_of(args, flag):
                raise InputError(
                    f"{spelled(flag)} is about packed rows: --dynmix-packed-rows is missing, and rows of "
                    "pre-training data have no padding to leave out and are attended to as a whole"
                )
        if value_of(args, "sft"):
            raise InputError(
                "--sft alone reads conversations with a dataset whose length depends on the blend; prepare "
                "them with `megatron-dynmix prepare`, give the prefixes as --data-path and add "
                "--dynmix-packed-rows"
            )
        return
    if joined != bool(value_of(args, "sft")):
        raise InputError(
            "--dynmix-packed-rows with Transformer Engine needs --sft, which makes Megatron-LM take rows of "
            "several sequences; with --transformer-impl local it takes a mask, and --sft must be left out"
        )
    if joined and args.micro_batch_size > 1:
        raise InputError(
            f"--micro-batch-size is {args.micro_batch_size}; with packed rows Megatron-LM's own code for "
            "several sequences in a row takes 1"
        )
    if not joined and args.tensor_model_parallel_size > 1 and not args.create_attention_mask_in_dataloader:
        raise InputError(
            "with --no-create-attention-mask-in-dataloader only the first tensor-parallel rank would get the "
            "mask of packed rows, and the others would attend across conversations; leave it out"
        )
    if value_of(args, "context_parallel_size") > 1:
        raise InputError(
            f"--context-parallel-size is {args.context_parallel_size}; Megatron-LM would cut packed rows up "
            "by sequence with Transformer Engine: use 1, or `megatron-dynmix train`"
        )
    if args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1) > 2 and not (
        args.dynmix_packed_attention
    ):
        raise InputError(
            "with packed rows the middle pipeline stages of Megatron-LM would attend across conversations, "
            "as they get no mask; add --dynmix-packed-attention, which gives them one"
        )
    if args.dynmix_padding_mask and value_of(args, "moe_router_enable_expert_bias"):
        raise InputError(
            "--dynmix-padding-mask fails in Megatron-Core's routers with --moe-router-enable-expert-bias; "
            "leave one out, or use `megatron-dynmix train`"
        )


def check_mix(mixing: MixingConfig, blend: Blend, caps: Mapping[str, float], args: Namespace) -> None:
    """Refuse settings that cannot be followed with these sources and this model."""
    shape = {"num_layers": args.num_layers, "moe_layer_freq": args.moe_layer_freq}
    layers, names = moe_layers(Namespace(num_moe_experts=args.num_experts, **shape)), blend.names
    if mixing.strategy == "uniform" and blend.weights and len(set(blend.weights)) > 1:
        raise InputError(
            "--dynmix-strategy is uniform, but the sources have different weights in --data-path; use fixed"
        )
    check_strategies(mixing, names, layers)
    resolved = {**resolve_files(mixing, names), "max_epochs": [caps.get(name) for name in names]}
    check_mixing(mixing, resolved, names, len(layers))
    if not args.dynmix_packed_rows:
        for setting, value in (("unit", "examples"), ("load_tokens", "trained")):
            if getattr(mixing, setting) == value:
                raise InputError(
                    f"--dynmix-{setting.replace('_', '-')} {value} needs --dynmix-packed-rows: rows of "
                    "pre-training data have no examples in them, and every token is trained on"
                )


def check_sources(prefixes: list[str], args: Namespace) -> None:
    """Refuse data of a kind that the dataset would tear apart, or that is no data."""
    for prefix in prefixes:
        prepared = is_prepared(prefix)
        if prepared and not args.dynmix_packed_rows:
            raise InputError(
                f"{prefix} was written by `megatron-dynmix prepare`; read as pre-training data its "
                "conversations would be torn apart and the masks lost: add --dynmix-packed-rows"
            )
        if args.dynmix_packed_rows and not prepared:
            raise InputError(
                f"{prefix} was not written by `megatron-dynmix prepare` (no {Path(prefix).name}.json is "
                "beside it); prepare it, or leave --dynmix-packed-rows out"
            )
        if "://" not in prefix and not Path(f"{prefix}.idx").is_file():
            raise InputError(
                f"--data-path names {prefix}, but there is no {prefix}.idx; give prefixes of .bin/.idx "
                "files, as tools/preprocess_data.py or `megatron-dynmix prepare` write them"
            )


def check_records(args: Namespace) -> None:
    """Refuse a folder with the records of another run."""
    run_dir = args.dynmix_run_dir
    if run_dir and (args.finetune or not args.load) and (Path(run_dir) / "ledger.jsonl").exists():
        raise InputError(
            f"--dynmix-run-dir {run_dir} holds the records of another run, and this one begins anew; go on "
            "with that run by --load, or give another folder"
        )


def is_prepared(prefix: str) -> bool:
    """Whether `megatron-dynmix prepare` wrote these files: it leaves digests and a report beside them."""
    return all(Path(f"{prefix}.{kind}").is_file() for kind in ("idx", "json", "digests"))
