"""Settings of Megatron-Core that cannot be given here, and why: all but its own values are refused by name.

A setting that nothing of a run reads would be taken and do nothing, so it stands here too;
`tests/unit/test_megatron_reads.py` looks for those in the installed version.
"""

_WHY = {
    "the loss is always the mean over the trained tokens of the global batch": (
        *("calculate_per_token_loss", "average_in_collective"),
    ),
    "rows all have seq_length positions": ("variable_seq_lengths",),
    "rows all have seq_length positions, an equal part on each rank": (
        *("hybrid_context_parallel", "max_seqlen_per_dp_cp_rank"),
    ),
    "half precision here is bf16: give --bf16": ("fp16",),
    "half precision here is bf16, whose gradients need no scale": (
        *("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
        *("apply_query_key_layer_scaling",),
    ),
    "it follows from --bf16": ("params_dtype", "pipeline_dtype", "autocast_dtype", "enable_autocast"),
    "it follows from whether Transformer Engine is there": (
        *("transformer_impl", "use_kitchen", "use_kitchen_attention", "kitchen_attention_backend"),
    ),
    "it is not supported by the counting router": ("moe_enable_routing_replay",),
    "random routing would make the gate loads meaningless": ("moe_router_force_load_balancing",),
    "a captured graph would not run the router's counting": (
        *("cuda_graph_impl", "enable_cuda_graph", "external_cuda_graph", "cuda_graph_scope"),
        *("cuda_graph_warmup_steps", "cuda_graph_use_single_mempool", "cuda_graph_retain_backward_graph"),
    ),
    "only captured graphs need generators of Transformer Engine's": ("use_te_rng_tracker",),
    "it runs layers after the micro-batch's sources were announced": (
        *("overlap_moe_expert_parallel_comm", "delay_wgrad_compute", "ep_overlap_early_attn_memory_release"),
    ),
    "parameters are gathered into buffers of their own": (
        *("fp8_param_gather", "reuse_grad_buf_for_mxfp8_param_ag"),
    ),
    "it needs user buffers of Transformer Engine, which nothing here makes": (
        *("tp_comm_overlap", "tp_comm_bulk_wgrad", "tp_comm_bulk_dgrad", "tp_comm_overlap_ag"),
        *("tp_comm_overlap_rs", "tp_comm_overlap_rs_dgrad", "tp_comm_split_ag", "tp_comm_atomic_ag"),
        *("tp_comm_split_rs", "tp_comm_atomic_rs", "tp_comm_overlap_disable_qkv"),
        *("tp_comm_overlap_disable_fc1", "tp_comm_bootstrap_backend"),
    ),
    "Megatron-Core always does that": ("async_tensor_model_parallel_allreduce",),
    "Megatron-Core reads it nowhere": ("apply_residual_connection_post_layernorm",),
    "pipeline stages talk as all ranks do, over NCCL or gloo": (
        *("pipeline_model_parallel_comm_backend", "use_ring_exchange_p2p"),
    ),
    "recomputation is the same for all micro-batches": (
        "num_microbatches_with_partial_activation_checkpoints",
    ),
    "with sequence parallelism each rank keeps its slice as it is": ("distribute_saved_activations",),
    "keys and values are gathered over all context-parallel ranks, or go around them": (
        *("hierarchical_context_parallel_sizes", "cp_comm_type"),
    ),
    "give num_layers_in_first_pipeline_stage or ..._in_last_pipeline_stage": (
        "pipeline_model_parallel_layout",
    ),
    "give expert_tensor_parallel_size": ("moe_extended_tp",),
    "give moe_expert_capacity_factor": ("moe_token_dropping",),
    "multi-token prediction is not supported": (
        *("mtp_num_layers", "mtp_standalone", "mtp_loss_scaling_factor"),
    ),
    "nothing is generated while training": (
        *("cache_mla_latents", "flash_decode", "batch_invariant_mode", "inference_rng_tracker"),
        *("inference_sampling_seed", "use_inference_optimized_layers", "inference_fuse_tp_communication"),
        *("mlp_chunks_for_prefill", "symmetric_ar_type"),
    ),
    "layers are those of a GPT: softmax attention and an MLP or experts, all alike": (
        *("experimental_attention_variant", "dsa_indexer_n_heads", "dsa_indexer_head_dim"),
        *("dsa_indexer_topk", "dsa_indexer_loss_coeff", "dsa_indexer_use_sparse_loss"),
        *("linear_attention_freq", "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim"),
        *("linear_num_key_heads", "linear_num_value_heads", "is_hybrid_model", "mamba_state_dim"),
        *("mamba_head_dim", "mamba_num_groups", "mamba_num_heads", "use_mamba_mem_eff_path"),
        *("heterogeneous_block_specs", "hetereogenous_dist_checkpoint", "mrope_section"),
    ),
    "attention is one kernel, whose softmax is in float32": (
        *("attention_softmax_in_fp32", "masked_softmax_fusion"),
    ),
    "it does not take rows of several segments": ("fused_single_qkv_rope",),
    "nothing here clips attention": ("qk_clip", "qk_clip_alpha", "qk_clip_threshold"),
    "no record has it": ("log_max_attention_logit", "log_num_zeros_in_grad", "moe_per_layer_logging"),
    "norms are Transformer Engine's or torch's, which have no such choice": (
        *("persist_layer_norm", "memory_efficient_layer_norm"),
    ),
    "norms of queries and keys have weights: give qk_layernorm": ("qk_l2_norm",),
    "the activation is SiLU": ("use_fused_weighted_squared_relu",),
    "Megatron-Core cannot save an MLP with it": ("use_te_activation_func",),
    "expert-parallel ranks would begin with the same experts": ("use_cpu_initialization",),
    "gradients are checked before every step: see nonfinite": (
        *("check_for_nan_in_grad", "check_for_large_grads"),
    ),
    "there are no timers": ("barrier_with_L1_time",),
    "a run keeps its configuration in config.yaml": ("config_logger_dir",),
    "checkpoints hold master weights whole, for every layout": (
        *("use_precision_aware_optimizer", "store_param_remainders"),
    ),
    "the optimizer is Adam": (
        *("sgd_momentum", "muon_momentum", "muon_split_qkv", "muon_use_nesterov", "muon_scale_mode"),
        *("muon_fp32_matmul_prec", "muon_num_ns_steps", "muon_tp_mode", "muon_extra_scale_factor"),
    ),
    "Transformer Engine, from 1.8 on, leaves it aside": ("fp8_interval",),
    "the state of an optimizer on the CPU is in no checkpoint": (
        *("optimizer_cpu_offload", "optimizer_offload_fraction", "use_torch_optimizer_for_cpu_offload"),
        *("overlap_cpu_optimizer_d2h_h2d", "pin_cpu_grads", "pin_cpu_params"),
    ),
    "checkpoints of FSDP models are not supported": (
        *("use_megatron_fsdp", "use_custom_fsdp", "init_model_with_meta_device", "fsdp_double_buffer"),
        *("data_parallel_sharding_strategy", "outer_dp_sharding_strategy", "fsdp_manual_registration"),
        *("gradient_reduce_div_fusion", "suggested_communication_unit_size", "preserve_fp32_weights"),
        *("keep_fp8_transpose_cache",),
    ),
}

DECIDED = {name: why for why, names in _WHY.items() for name in names}
"""Setting -> why it cannot be given."""
OVERRULED = (
    *("calculate_per_token_loss", "check_for_nan_in_grad", "params_dtype", "pipeline_dtype"),
    *("autocast_dtype", "transformer_impl"),
)
"""Those of which a run has another value than Megatron-Core by default, so that this one is refused too."""
