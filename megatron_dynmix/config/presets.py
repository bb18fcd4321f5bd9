"""Published model sizes, as fields of our `ModelConfig` and of Megatron-Core's `TransformerConfig`.

Sources: the `config.json` of each model on the Hugging Face hub, at mistralai/Mixtral-8x7B-v0.1,
mistralai/Mixtral-8x22B-v0.1, Qwen/Qwen3-30B-A3B, Qwen/Qwen1.5-MoE-A2.7B, allenai/OLMoE-1B-7B-0924 and
llama-moe/LLaMA-MoE-v1-3_5B-2_8 (and -3_5B-4_16, -3_0B-2_16).
"""

from __future__ import annotations

from typing import Any

COMMON: dict[str, Any] = {
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "moe_router_dtype": "fp32",
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.01,
    "moe_token_dispatcher_type": "alltoall",
}
"""What all presets share: a pre-norm SwiGLU decoder with RMSNorm and a top-k router."""

LLAMA_MOE: dict[str, Any] = {
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rotary_base": 10000.0,
    "num_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_query_groups": 32,
    "router_network": "mlp",
    "router_noise": "training",
}
"""What the models of LLaMA-MoE v1 share: LLaMA-2 7B, its feed-forward layers split into experts.

The scores of the chosen experts are scaled by experts / chosen experts.
"""

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 4096,
        "max_position_embeddings": 4096,
        "rotary_base": 10000.0,
        "num_layers": 2,
        "hidden_size": 128,
        "ffn_hidden_size": 256,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "num_moe_experts": 8,
        "moe_router_topk": 2,
    },
    "mixtral-8x7b": {
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "rotary_base": 1e6,
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "num_moe_experts": 8,
        "moe_router_topk": 2,
    },
    "mixtral-8x22b": {
        "vocab_size": 32000,
        "max_position_embeddings": 65536,
        "rotary_base": 1e6,
        "num_layers": 56,
        "hidden_size": 6144,
        "ffn_hidden_size": 16384,
        "num_attention_heads": 48,
        "num_query_groups": 8,
        "num_moe_experts": 8,
        "moe_router_topk": 2,
    },
    "qwen3-30b-a3b": {
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rotary_base": 1e6,
        "num_layers": 48,
        "hidden_size": 2048,
        "ffn_hidden_size": 6144,
        "moe_ffn_hidden_size": 768,
        "num_attention_heads": 32,
        "num_query_groups": 4,
        "kv_channels": 128,
        "qk_layernorm": True,
        "layernorm_epsilon": 1e-6,
        "num_moe_experts": 128,
        "moe_router_topk": 8,
    },
    "qwen1.5-moe-a2.7b": {
        "vocab_size": 151936,
        "max_position_embeddings": 8192,
        "rotary_base": 1e6,
        "num_layers": 24,
        "hidden_size": 2048,
        "ffn_hidden_size": 5632,
        "moe_ffn_hidden_size": 1408,
        "moe_shared_expert_intermediate_size": 5632,
        "moe_shared_expert_gate": True,
        "num_attention_heads": 16,
        "num_query_groups": 16,
        "add_qkv_bias": True,
        "layernorm_epsilon": 1e-6,
        "num_moe_experts": 60,
        "moe_router_topk": 4,
        # as OLMoE: the softmax is over all experts, and the chosen ones are not renormalised
        "moe_router_pre_softmax": True,
    },
    "olmoe-1b-7b": {
        "vocab_size": 50304,
        "max_position_embeddings": 4096,
        "rotary_base": 10000.0,
        "num_layers": 16,
        "hidden_size": 2048,
        "ffn_hidden_size": 1024,
        "num_attention_heads": 16,
        "num_query_groups": 16,
        "qk_layernorm": True,
        "qk_layernorm_full_width": True,
        "num_moe_experts": 64,
        "moe_router_topk": 8,
        # OLMoE takes the softmax over all experts and does not renormalise the chosen ones
        "moe_router_pre_softmax": True,
    },
    "llama-moe-3.5b-2-8": {
        **LLAMA_MOE,
        "ffn_hidden_size": 1376,
        "num_moe_experts": 8,
        "moe_router_topk": 2,
        "moe_router_topk_scaling_factor": 4.0,
    },
    "llama-moe-3.5b-4-16": {
        **LLAMA_MOE,
        "ffn_hidden_size": 688,
        "num_moe_experts": 16,
        "moe_router_topk": 4,
        "moe_router_topk_scaling_factor": 4.0,
    },
    "llama-moe-3.0b-2-16": {
        **LLAMA_MOE,
        "ffn_hidden_size": 688,
        "num_moe_experts": 16,
        "moe_router_topk": 2,
        "moe_router_topk_scaling_factor": 8.0,
    },
}
