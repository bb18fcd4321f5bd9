"""ModuleFormer (MoLM) in plain torch, from its description: what our model of it is compared with.

Axes: B rows, S positions, H hidden size, E experts, K chosen experts, T tokens, V vocabulary. Parameters have
the names of the published model's tensors, and experts' matrices their axes: [E, in, out].
"""

import json

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import gelu


def small_config(**changes):
    """A config.json of the published kind, of a tiny model with odd sizes."""
    return {
        "architectures": ["ModuleFormerForCausalLM"],
        "model_type": "moduleformer",
        "vocab_size": 1031,
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 1,
        "att_hidden": 24,
        "ffd_hidden": 20,
        "gating_size": 7,
        "n_att_experts": 5,
        "k_att": 2,
        "n_mlp_experts": 8,
        "k_mlp": 3,
        "activation_function": "gelu_new",
        "gate_type": "mlp",
        "sample_topk": 0,
        "moe_pdrop": 0,
        "attn_pdrop": 0,
        "embd_pdrop": 0,
        "resid_pdrop": 0,
        "aux_loss_type": "mi",
        "aux_loss_weight": 0,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
        "block_size": 512,
        "history_length": 512,
        "torch_dtype": "float32",
        **changes,
    }


class Gate(nn.Module):
    """The probabilities of the most likely experts, as they are among all."""

    def __init__(self, config, experts, chosen):
        super().__init__()
        H, W = config["n_embd"], config["gating_size"]
        self.w_gate = nn.Sequential(
            nn.Linear(H, W), nn.GELU(), nn.Identity(), nn.Linear(W, experts, bias=False)
        )
        self.chosen = chosen

    def forward(self, x_TH):
        return self.w_gate(x_TH).softmax(-1).topk(self.chosen, dim=-1)


class PerExpert(nn.Module):
    def __init__(self, experts, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, inputs, outputs) * inputs**-0.5)

    def forward(self, x_TI, expert_T):
        return torch.einsum("ti,tio->to", x_TI, self.weight[expert_T])


class Experts(nn.Module):
    def __init__(self, config, experts, chosen, inner):
        super().__init__()
        H = config["n_embd"]
        self.experts, self.output_experts = PerExpert(experts, H, inner), PerExpert(experts, inner, H)
        self.gate = Gate(config, experts, chosen)

    def forward(self, x_TH, between):
        """Sum of what the chosen experts of each token put out, `between` their two matrices."""
        weight_TK, expert_TK = self.gate(x_TH)
        parts = [
            weight_T[:, None] * self.output_experts(between(self.experts(x_TH, expert_T)), expert_T)
            for weight_T, expert_T in zip(weight_TK.unbind(1), expert_TK.unbind(1), strict=True)
        ]
        return torch.stack(parts).sum(0)


def break_sticks(query_BSH, key_BSH, value_BSH, segment_BS):
    """Attend: from its own position back, each key gets a share of what those between have left."""
    length, width = key_BSH.shape[1:]
    share_BSS = torch.sigmoid(query_BSH @ key_BSH.mT * width**-0.5)
    before = torch.ones(length, length, dtype=torch.bool).tril()
    share_BSS = share_BSS * (before & (segment_BS[:, :, None] == segment_BS[:, None, :]))
    left = [(1 - share_BSS[..., position + 1 :]).prod(-1) for position in range(length)]
    return share_BSS * torch.stack(left, -1) @ value_BSH


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.q_proj = Experts(config, config["n_att_experts"], config["k_att"], config["att_hidden"])

    def forward(self, x_BSH, segment_BS):
        def attend(query_TH):
            return break_sticks(query_TH.view_as(x_BSH), x_BSH, x_BSH, segment_BS).flatten(0, 1)

        return self.q_proj(x_BSH.flatten(0, 1), attend).view_as(x_BSH)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        H = config["n_embd"]
        self.ln_1, self.ln_2 = nn.LayerNorm(H), nn.LayerNorm(H)
        self.attn = Attention(config)
        self.mlpf = Experts(config, config["n_mlp_experts"], config["k_mlp"], config["ffd_hidden"])

    def forward(self, x_BSH, segment_BS):
        x_BSH = x_BSH + self.attn(self.ln_1(x_BSH), segment_BS)
        mlp_TH = self.mlpf(self.ln_2(x_BSH).flatten(0, 1), lambda h: gelu(h, approximate="tanh"))
        return x_BSH + mlp_TH.view_as(x_BSH)


class ModuleFormer(nn.Module):
    """`forward(tokens_BS)` gives logits `[B, S, V]`; segments do not see one another."""

    def __init__(self, config):
        super().__init__()
        H, V = config["n_embd"], config["vocab_size"]
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(V, H)
        self.transformer.h = nn.ModuleList(Layer(config) for _ in range(config["n_layer"]))
        self.transformer.ln_f = nn.LayerNorm(H)
        self.lm_head = nn.Linear(H, V, bias=False)
        for name, parameter in self.named_parameters():
            if "ln_" in name or "gate" in name:  # nothing at a value that has no effect
                parameter.data += torch.randn_like(parameter) * 0.4

    def forward(self, tokens_BS, segment_BS=None):
        segment_BS = torch.zeros_like(tokens_BS) if segment_BS is None else segment_BS
        x_BSH = self.transformer.wte(tokens_BS)
        for layer in self.transformer.h:
            x_BSH = layer(x_BSH, segment_BS)
        return self.lm_head(self.transformer.ln_f(x_BSH))


def save_folder(model, config, folder):
    """Write the model as it is published: config.json, and safetensors with the masks of each layer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = dict(model.state_dict())
    for layer in range(config["n_layer"]):
        tensors[f"transformer.h.{layer}.attn.mask"] = torch.ones(32, 32, dtype=torch.int8).tril()
        tensors[f"transformer.h.{layer}.attn.cum_weight"] = torch.ones(32, 32).tril(-1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
