"""LLaMA-MoE v1 in plain torch, from its description: what our model of it is compared with.

Axes: B rows, S positions, H hidden size, N heads, D head width, E experts, K chosen experts, T tokens.
Parameters have the names of the published model's tensors.
"""

import json

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu


def small_config(**changes):
    """A config.json of the published kind, of a tiny model with odd sizes."""
    experts = changes.get("num_experts", 4)
    width = changes.get("intermediate_size", 24 * experts)
    layers = changes.get("num_hidden_layers", 2)
    return {
        "architectures": ["LlamaMoEForCausalLM"],
        "model_type": "llama_moe",
        "vocab_size": 1031,
        "hidden_size": 32,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_scaling": None,
        "pretraining_tp": 1,
        "torch_dtype": "float32",
        "num_experts": experts,
        "num_selects": 2,
        "size_experts": [[width // experts] * experts] * layers,
        "gate_type": "TopKBalancedNoisyGate",
        "gate_network": "mlp",
        "gate_use_softmax": True,
        "gate_use_balance": True,
        "gate_balance_loss_weight": 0.01,
        "gate_add_noise": True,
        "gate_noise_epsilon": 0.01,
        "calculator_type": "UniversalCalculator",
        "multiply_gate_scores": True,
        "score_scale_factor": 2.0,
        "add_weight_norm": False,
        "drop_tokens": True,
        "dropped_padding": "zero",
        "capacity_factor": 1.25,
        **changes,
    }


class Norm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, hidden = config["num_attention_heads"], config["hidden_size"]
        for name in "qkvo":
            self.add_module(f"{name}_proj", nn.Linear(hidden, hidden, bias=False))

    def forward(self, x_BSH):
        B, S, H = x_BSH.shape
        q, k, v = (
            project(x_BSH).view(B, S, self.heads, -1).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(B, S, H))


def rotated(x_BNSD):
    """Rotary positions from 0, base 10000, halves of a head rotated against each other."""
    S, D = x_BNSD.shape[-2:]
    frequency = 10000.0 ** -(torch.arange(0, D, 2) / D)
    angle_SD = (torch.arange(S)[:, None] * frequency).repeat(1, 2)
    first, second = x_BNSD.chunk(2, dim=-1)
    return x_BNSD * angle_SD.cos() + torch.cat([-second, first], dim=-1) * angle_SD.sin()


class Gate(nn.Module):
    def __init__(self, config):
        super().__init__()
        H, E = config["hidden_size"], config["num_experts"]
        self.chosen = config["num_selects"]
        layers = nn.Linear(H, E, bias=False), nn.Tanh(), nn.Linear(E, E, bias=False)
        self.gate_network = nn.Sequential(*layers)
        self.weight_noise = nn.Linear(H, E, bias=False) if config["gate_add_noise"] else None

    def forward(self, x_TH):
        logits_TE = self.gate_network(x_TH)
        if self.training and self.weight_noise is not None:
            deviation_TE = nn.functional.softplus(self.weight_noise(x_TH)) + 0.01
            logits_TE = logits_TE + torch.randn_like(logits_TE) * deviation_TE
        logits_TK, experts_TK = logits_TE.topk(self.chosen, dim=1)
        return logits_TK.softmax(1), experts_TK


class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        H, E = config["hidden_size"], config["num_experts"]
        F = config["intermediate_size"] // E
        self.weight_gate = nn.ParameterList(torch.randn(F, H) * 0.1 for _ in range(E))
        self.weight_up = nn.ParameterList(torch.randn(F, H) * 0.1 for _ in range(E))
        self.weight_down = nn.ParameterList(torch.randn(H, F) * 0.1 for _ in range(E))

    def forward(self, x, expert):
        gate = silu(linear(x, self.weight_gate[expert]))
        return linear(gate * linear(x, self.weight_up[expert]), self.weight_down[expert])


class MoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate, self.calculator = Gate(config), nn.Module()
        self.calculator.experts = Experts(config)
        self.scale = config["score_scale_factor"]

    def forward(self, x_BSH):
        x_TH = x_BSH.flatten(0, 1)
        score_TK, experts_TK = self.gate(x_TH)
        outputs = []
        for x, scores, experts in zip(x_TH, score_TK, experts_TK, strict=True):
            parts = [
                self.scale * s * self.calculator.experts(x, e) for s, e in zip(scores, experts, strict=True)
            ]
            outputs.append(torch.stack(parts).sum(0))
        return torch.stack(outputs).view_as(x_BSH)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        size, eps = config["hidden_size"], config["rms_norm_eps"]
        self.self_attn, self.mlp = Attention(config), MoE(config)
        self.input_layernorm, self.post_attention_layernorm = Norm(size, eps), Norm(size, eps)

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaMoE(nn.Module):
    """`forward(tokens_BS)` gives logits `[B, S, V]`."""

    def __init__(self, config):
        super().__init__()
        H, V = config["hidden_size"], config["vocab_size"]
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(V, H)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.model.norm = Norm(H, config["rms_norm_eps"])
        self.lm_head = nn.Linear(H, V, bias=False)
        for name, parameter in self.named_parameters():
            scale = 1.0 if "gate_network" in name else 0.1  # experts must be chosen for a reason
            nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=scale)

    def forward(self, tokens_BS):
        x = self.model.embed_tokens(tokens_BS)
        for layer in self.model.layers:
            x = layer(x)
        return self.lm_head(self.model.norm(x))


def save_folder(model, config, folder):
    """Write the model as it is published: config.json and safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
