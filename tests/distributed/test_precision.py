"""What stays as it is where parameters are bf16 or fp16: buffers, and tensors that are neither."""

import numpy as np
import torch
import yaml

from megatron_dynmix.config.load import load_config
from megatron_dynmix.config.megatron import transformer_config
from megatron_dynmix.config.presets import PRESETS
from megatron_dynmix.model.gpt import build_gpt, half_precision, unwrap
from megatron_dynmix.training import run as training_run
from megatron_dynmix.training.trainer import seed_iteration
from tests.deepseek_models import tiny_model
from tests.distributed import layouts, programs
from tests.distributed.conftest import SMALL
from tests.distributed.layouts import ep
from tests.distributed.ranks import run_ranks

BIAS = ["--moe-router-enable-expert-bias", "--moe-router-score-function", "sigmoid"]
SIZES = [*SMALL, *("--num-query-groups", "2", "--num-experts", "8", "--moe-router-topk", "2")]
LATENT = [
    *("--multi-latent-attention", "--q-lora-rank", "8", "--kv-lora-rank", "8", "--qk-head-dim", "8"),
    *("--qk-pos-emb-head-dim", "8", "--v-head-dim", "8"),
]
FAMILIES = ("mixtral-8x7b", "qwen3-30b-a3b", "qwen1.5-moe-a2.7b", "olmoe-1b-7b", "llama-moe-3.5b-4-16")
MODELS = {
    **{
        preset: ["--preset", preset, *(["--kv-channels", "16"] if "kv_channels" in PRESETS[preset] else [])]
        for preset in FAMILIES
    },
    "every balance": [
        *("--moe-router-load-balancing-type", "[aux_loss, seq_aux_loss, global_aux_loss]"),
        *("--moe-aux-loss-coeff", "[0.1, 0.1, 0.1]", "--moe-z-loss-coeff", "0.1", *BIAS),
    ],
    "latent, rope": [*LATENT, "--rope-type", "rope", *BIAS],
    "latent, yarn": [*LATENT, "--rope-type", "yarn", *BIAS],
}
KNOWN = {"expert_bias", "local_tokens_per_expert", "global_tokens_per_expert", "ga_steps", "inv_freq"}
"""What must be there to be looked at; `inv_freq` is no buffer."""


def tensors(model):
    """Name -> buffers, and tensors that modules hold without telling torch."""
    held = dict(model.named_buffers())
    for prefix, module in model.named_modules():
        own = {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
        held |= {f"{prefix}.{name}": value for name, value in own.items()}
    return held


def cast(run_yaml, flags_of):
    """(model, type) -> names seen, and what a model in half precision has otherwise than before."""
    found = {}
    for name, flags in flags_of.items():
        config = load_config(run_yaml, flags)
        training_run.join_job(config)
        seed_iteration(0, 0)
        for half in ("bf16", "fp16") if name not in FAMILIES else ("bf16",):
            transformer = transformer_config(config)
            setattr(transformer, half, True)
            gpt = build_gpt(config, transformer, transformer_engine=False)
            for buffer in gpt.buffers():
                if buffer.is_floating_point():
                    buffer.uniform_()
            before = {key: (held, held.clone()) for key, held in tensors(gpt).items()}
            model = unwrap(half_precision(transformer, gpt))
            assert {parameter.dtype for parameter in model.parameters()} == {
                {"bf16": torch.bfloat16, "fp16": torch.float16}[half]
            }
            after = tensors(model)
            assert after.keys() == before.keys()
            changed = [
                key
                for key, (held, values) in before.items()
                if after[key] is not held or after[key].dtype != values.dtype or not held.equal(values)
            ]
            found[name, half] = {key.rsplit(".", 1)[-1] for key in before}, changed
    return found


def test_no_buffer_is_cast_with_the_parameters(run_yaml):
    flags_of = {name: [*SIZES, *flags, *ep(1)] for name, flags in MODELS.items()}
    found = run_ranks(1, cast, run_yaml, flags_of)[0]
    assert {case: changed for case, (_, changed) in found.items() if changed} == {}
    assert set().union(*(names for names, _ in found.values())) >= KNOWN


def ways(run_yaml, folder, flags, run_dir):
    """Way into a model -> its expert biases: from a folder, another run, a resume, in either precision."""
    found = {}

    def begin(name, *more, resume="no"):
        layouts.start_anew()
        trainer = programs.train_from(load_config(run_yaml, [*flags, *more]), run_dir / name, resume=resume)
        found[name, resume] = {
            key: (str(buffer.dtype), buffer.double().numpy())
            for key, buffer in unwrap(trainer.run.chunks[0]).named_buffers()
            if key.endswith("expert_bias")
        }

    both = {"fp32": ["--no-bf16"], "bf16": ["--bf16"]}
    for first, second in (("fp32", "bf16"), ("bf16", "fp32")):
        begin(first, "--load-hf", folder, *both[first])
        weights = ["--pretrained-checkpoint", str(run_dir / first / "checkpoints")]
        begin(f"{first} to {second}", *weights, *both[second])
        begin(first, "--load-hf", folder, *both[second], "--train-iters", "2", resume="must")
    return found


def test_an_expert_bias_is_whole_after_every_way_into_either_precision(run_yaml, tmp_path):
    model = tiny_model("V3", vocab_size=1031)  # room for the tokenizer of the sources
    biases = [
        layer.mlp.gate.e_score_correction_bias for layer in model.model.layers if hasattr(layer.mlp, "gate")
    ]
    for bias in biases:
        bias.uniform_(-0.1, 0.1)
    model.save_pretrained(tmp_path / "model")
    settings = yaml.safe_load(run_yaml.read_text())
    settings["model"] = {"preset": str(tmp_path / "model"), "freeze_router": True}
    own_yaml = run_yaml.with_name("precision.yaml")  # paths in it are those of its folder
    own_yaml.write_text(yaml.safe_dump(settings))
    flags = [*SMALL[SMALL.index("--seq-length") :], *ep(1), "--strategy", "uniform", "--train-iters", "1"]
    found = run_ranks(1, ways, own_yaml, str(tmp_path / "model"), flags, tmp_path / "runs")[0]
    assert len(found) == 6
    for way, held in found.items():
        assert len(held) == len(biases) == 2
        for (name, (dtype, ours)), its in zip(sorted(held.items()), biases, strict=True):
            assert dtype == "torch.float32" and np.array_equal(ours, its.double().numpy()), (way, name)
