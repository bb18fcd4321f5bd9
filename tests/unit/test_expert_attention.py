"""Attention experts are those of JetMoE in `transformers`, which attends with a softmax over projected keys.

Axes: Q positions, B rows, H hidden size, K chosen experts, G heads of keys, D width of a head.
"""

import torch
from transformers import JetMoeConfig
from transformers.models.jetmoe.modeling_jetmoe import JetMoeAttention

from megatron_dynmix import platform

platform.start()

from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_dynmix.convert.logits import one_rank  # noqa: E402
from megatron_dynmix.model.expert_attention import ExpertAttention  # noqa: E402
from megatron_dynmix.moe.router import GateLoadRouter  # noqa: E402

EXPERTS, CHOSEN, HEADS, WIDTH, HIDDEN = 6, 2, 3, 8, 28


class SoftmaxOverProjectedKeys(ExpertAttention):
    """What JetMoE has in the place of sticks and of keys that are the layer's input; no positions."""

    def keys_and_values(self, hidden_QBH):
        both = torch.nn.functional.linear(hidden_QBH, self.key_value_weight)
        return tuple(part.unflatten(-1, (HEADS, WIDTH)) for part in both.chunk(2, dim=-1))

    def attend(self, query_QBKGD, key_SBGD, value_SBGD, attention_mask):
        query, key, value = (
            tensor.permute(order)
            for tensor, order in (
                (query_QBKGD, (1, 2, 3, 0, 4)),
                (key_SBGD[:, :, None].expand(-1, -1, CHOSEN, -1, -1), (1, 2, 3, 0, 4)),
                (value_SBGD[:, :, None].expand(-1, -1, CHOSEN, -1, -1), (1, 2, 3, 0, 4)),
            )
        )
        context = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return context.permute(3, 0, 1, 2, 4)


def test_outputs_and_gradients_are_those_of_jetmoe():
    torch.manual_seed(3)
    theirs = JetMoeAttention(
        JetMoeConfig(
            **{"hidden_size": HIDDEN, "num_key_value_heads": HEADS, "kv_channels": WIDTH},
            **{"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "attn_implementation": "eager"},
        ),
        layer_idx=0,
    )
    for parameter in theirs.parameters():
        parameter.data = torch.randn_like(parameter) * 0.4
    theirs.experts.bias.data.zero_()
    config = TransformerConfig(
        **{"num_layers": 1, "hidden_size": HIDDEN, "num_attention_heads": HEADS * CHOSEN},
        **{"num_query_groups": HEADS, "kv_channels": WIDTH, "add_bias_linear": False},
        **{"num_moe_experts": 4, "moe_router_topk": 2},
    )
    hidden_BQH = torch.randn(2, 13, HIDDEN, requires_grad=True)
    with one_rank():
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        ours = SoftmaxOverProjectedKeys(config, 1, experts=EXPERTS, router=GateLoadRouter)
        with torch.no_grad():
            ours.router.weight.copy_(theirs.experts.router.layer.weight)
            ours.query_weight.copy_(theirs.experts.input_linear.weight.mT)
            ours.output_weight.copy_(theirs.experts.output_linear.weight.mT)
        ours.key_value_weight = theirs.kv_proj.weight
        found = ours(hidden_BQH.transpose(0, 1).contiguous())[0].transpose(0, 1)
    still = torch.ones(2, 13, WIDTH), torch.zeros(2, 13, WIDTH)  # cosines and sines that turn nothing
    mask = torch.full((13, 13), -torch.inf).triu(1).expand(2, 1, -1, -1)
    wanted = theirs(hidden_BQH, position_embeddings=still, attention_mask=mask)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(wanted)
    experts = theirs.experts
    pairs = (
        (hidden_BQH, hidden_BQH),
        (ours.router.weight, experts.router.layer.weight),
        (ours.query_weight, experts.input_linear.weight),
        (ours.output_weight, experts.output_linear.weight),
    )
    mine = torch.autograd.grad((found * weight).sum(), [pair[0] for pair in pairs])
    its = torch.autograd.grad((wanted * weight).sum(), [pair[1] for pair in pairs])
    for one, other in zip(mine, its, strict=True):
        other = other.mT if other.dim() == 3 and other.shape[0] == EXPERTS else other
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
