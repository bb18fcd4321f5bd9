"""Tiny models of DeepSeek's architectures, made by transformers, with odd sizes."""

import torch
import transformers

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}
COMMON = {
    "vocab_size": 131,
    "hidden_size": 30,
    "intermediate_size": 22,
    "moe_intermediate_size": 14,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "n_routed_experts": 8,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "V3": ("deepseek_v3", {"q_lora_rank": 20, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}),
    "V3, yarn, no groups": (
        "deepseek_v3",
        {
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "rope_parameters": YARN,
        },
    ),
    "V2-Lite": (
        "deepseek_v2",
        {
            "q_lora_rank": None,
            "topk_method": "greedy",
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 1.5,
            "n_shared_experts": 2,
        },
    ),
}
"""Name -> family, what it has beside `COMMON`."""


def tiny_model(name, **changes):
    """A model with random weights, the correction of its router's scores among them."""
    family, own = MODELS[name]
    config = transformers.AutoConfig.for_model(family, **{**COMMON, **own, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        )
        corrections = [pair for pair in model.named_buffers() if pair[0].endswith("correction_bias")]
        with torch.no_grad():
            for key, values in [*model.named_parameters(), *corrections]:
                values.copy_(float("norm" in key) + 0.2 * torch.randn_like(values))
    model.set_experts_implementation("eager")
    return model
