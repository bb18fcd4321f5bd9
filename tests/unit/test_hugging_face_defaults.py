"""A config.json that says less, or otherwise, is what transformers makes of it: every key in turn."""

import json
import runpy
from pathlib import Path

import convert_fixtures as tiny
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_dynmix import platform
from megatron_dynmix.config.hugging_face import model_settings
from megatron_dynmix.config.presets import complete_model
from megatron_dynmix.convert.hf_folder import HuggingFaceFolder
from megatron_dynmix.convert.logits import compare_logits, fixed_tokens
from megatron_dynmix.convert.origin import model_of
from megatron_dynmix.convert.tensors import as_megatron
from megatron_dynmix.errors import InputError
from tests import deepseek_models, family_models

ROOT = Path(__file__).parents[2]
ABSENT = object()
ODD = {"rms_norm_eps": 1e-2, "rope_theta": 50.0, "tie_word_embeddings": True}
"""So that another value is seen in the logits."""
QWEN = {"norm_topk_prob": True, **tiny.MIXED}
BASES = {
    "mixtral": ({**ODD, "num_experts_per_tok": 3}, {}),
    "qwen2_moe": ({**ODD, **QWEN}, {"sliding_window": 16, "max_window_layers": 1}),
    "qwen3_moe": ({**ODD, **QWEN}, {"sliding_window": 16}),
    "olmoe": ({**ODD, "norm_topk_prob": True}, {}),
    "gpt_oss": ({}, {}),
    "V3": ({"routed_scaling_factor": 1.7, "rope_theta": 50.0}, {}),
    "V3, yarn, no groups": ({"routed_scaling_factor": 1.7}, {}),
    "V2-Lite": ({"rope_theta": 50.0}, {}),
    **{name: ({}, {}) for name in ("GLM-4.5", "GLM-4.5-Air", "GLM-4.7-Flash", "Moonlight", "dots.llm1")},
    "MiniMax-M2": ({}, {"rotary_dim": 6}),
    **{name: ({}, {}) for name in ("Granite", "Granite, shared experts")},
}
"""Name -> what a model has beside its sizes, and what its config.json says besides."""
WORDS = {"transformers_version", "architectures", "dtype", "layer_types", "qk_head_dim"}
"""What config.json of published models does not say, or says of the file."""
OF_NO_MATTER = {
    *("initializer_range", "router_aux_loss_coef", "output_router_logits", "use_cache", "pretraining_tp"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_window_layers"),
}
"""What a model computes does not depend on it, where no window is used."""
STRICTER = {
    # 8 of 2 groups: Megatron-Core would judge a group by 4 experts
    ("V3", ABSENT): {"num_experts_per_tok"},
    ("GLM-4.5", ABSENT): {"num_experts_per_tok", "topk_group"},
    ("dots.llm1", ABSENT): {"norm_topk_prob"},
    # null is false there, or an error where dropout is wanted
    **{
        (name, None): {"attention_dropout", "rope_interleave", "norm_topk_prob"}
        for name in ("V3", "V3, yarn, no groups", "Moonlight")
    },
    ("dots.llm1", None): {"attention_dropout", "norm_topk_prob"},
    ("V2-Lite", None): {"attention_dropout", "norm_topk_prob"},
    # null is what the attention at hand takes it for
    **{
        (name, None): {"attention_dropout", "attention_multiplier"}
        for name in ("Granite", "Granite, shared experts")
    },
}
"""What transformers runs, and is refused here by name."""


class Base:
    """A model in a folder, whose config.json can be said otherwise."""

    def __init__(self, name, folder):
        own, said = BASES[name]
        self.name, self.folder = name, folder
        models = next((kind for kind in (deepseek_models, family_models) if name in kind.MODELS), tiny)
        model = models.tiny_model(name, **own)
        model.save_pretrained(folder)
        self.shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
        written = json.loads((folder / "config.json").read_text())
        config = {key: value for key, value in written.items() if key not in WORDS}
        if "qk_rope_head_dim" in config:
            config.pop("head_dim", None)  # which says there what qk_rope_head_dim says
        rope = config.pop("rope_parameters")
        if name == "MiniMax-M2":
            del rope["partial_rotary_factor"]  # as published: rotary_dim says it
        elif "partial_rotary_factor" in rope:
            said = {"partial_rotary_factor": rope.pop("partial_rotary_factor")}
        scaling = None if rope["rope_type"] == "default" else rope
        self.config = {**config, "rope_theta": rope["rope_theta"], "rope_scaling": scaling, **said}
        self.known = []
        assert self.outcome({})[0] == "equal"

    def outcome(self, changes):
        """What becomes of a config.json here and there, and why; what was run once is not run again."""
        changed = {**self.config, **changes}
        changed = {key: value for key, value in changed.items() if value is not ABSENT}
        (self.folder / "config.json").write_text(json.dumps(changed))
        try:
            theirs = AutoConfig.from_pretrained(self.folder)
            means = {key: value for key, value in theirs.to_dict().items() if key not in OF_NO_MATTER}
        except Exception:
            theirs = means = None
        try:
            weights = HuggingFaceFolder(self.folder)
        except InputError as error:
            return f"refused here, {'runs' if self.runs(theirs) else 'fails'} there", str(error)
        if (weights.settings, means) in self.known:
            return "equal", "known"
        model = model_of(complete_model({"preset": None, **weights.settings}))
        verdict = compare_logits(self.folder, weights, as_megatron(weights, weights.weight_map()), model)
        if verdict.passed and verdict.why_not is None:
            self.known.append((weights.settings, means))
            return "equal", verdict.describe()
        return "differs", verdict.describe()

    def runs(self, config):
        """Whether transformers runs these weights with such a configuration."""
        try:
            with torch.device("meta"):
                shapes = AutoModelForCausalLM.from_config(config).state_dict()
            if {key: tensor.shape for key, tensor in shapes.items()} != self.shapes:
                return False
            model, said = AutoModelForCausalLM.from_pretrained(
                self.folder, config=config, experts_implementation="eager", output_loading_info=True
            )
            model(fixed_tokens(131, 64))
        except Exception:
            return False
        return not said["missing_keys"]


SLOW = {*family_models.MODELS, "gpt_oss"}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in BASES],
)
def base(request, tmp_path_factory):
    """One model after the other."""
    platform.start()
    return Base(request.param, tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    "value", [ABSENT, pytest.param(None, marks=pytest.mark.slow)], ids=["absent", "null"]
)
def test_every_key_in_turn_may_be_absent_or_null_as_in_transformers(value, base):
    """That is: the model is the same, or neither takes it."""
    wrong = {}
    for key in base.config.keys() - OF_NO_MATTER - STRICTER.get((base.name, value), set()):
        found, why = base.outcome({key: value})
        if found not in ("equal", "refused here, fails there"):
            wrong[key] = (found, why)
    assert not wrong, sorted(wrong)


PLAIN = {"rope_theta": ABSENT, "rope_scaling": ABSENT}
OTHER_BASE = {"type": "default", "rope_theta": 7.0}
HERE = "refused here, runs there"
SAID = {
    "all": {
        "as transformers 5 writes it": (
            {**PLAIN, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}},
            "equal",
        ),
        "a base in rope_scaling": ({"rope_scaling": OTHER_BASE}, "equal"),
        "a base there alone": ({**PLAIN, "rope_scaling": OTHER_BASE}, "equal"),
        "two bases": ({"rope_scaling": OTHER_BASE, "rope_parameters": {"rope_theta": 9.0}}, "equal"),
        "no scaling": ({"rope_scaling": {}, "rope_parameters": {"rope_theta": 9.0}}, "equal"),
        "another type": (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            HERE,
        ),
        "dropout": ({"attention_dropout": 0.3}, "equal"),
    },
    "mixtral": {
        "one expert": ({"num_experts_per_tok": 1}, HERE),
        "a window": ({"sliding_window": 16}, HERE),
        "a switch that it has not": (
            {"sliding_window": 16, "use_sliding_window": False},
            HERE,
        ),
        "a window as long as rows": ({"sliding_window": 64}, "equal"),
        "no window": ({"sliding_window": 0}, None),
        "experts by another name": ({"num_local_experts": ABSENT, "num_experts": 6}, "equal"),
        "experts by two names": ({"num_local_experts": 6, "num_experts": 6}, "equal"),
        "two numbers of experts": ({"num_local_experts": 6, "num_experts": 5}, None),
    },
    "qwen": {
        "a window": ({"use_sliding_window": True}, HERE),
        "a window of the usual length": (
            {"use_sliding_window": True, "sliding_window": ABSENT, "max_position_embeddings": 8192},
            HERE,
        ),
        "a window as long as rows": ({"use_sliding_window": True, "sliding_window": 64}, "equal"),
        "sums of weights": ({"norm_topk_prob": False}, "equal"),
        "every second layer": ({"decoder_sparse_step": 2, "mlp_only_layers": []}, None),
        "layers of experts": ({"mlp_only_layers": [0], "decoder_sparse_step": 1}, "equal"),
    },
    "qwen3_moe": {
        "a window of none": ({"use_sliding_window": True, "sliding_window": None}, "equal"),
    },
    "qwen2_moe": {
        "layers with windows": ({"layer_types": ["sliding_attention"] * 3}, None),
        "layers without": ({"layer_types": ["full_attention"] * 3}, "equal"),
    },
    "olmoe": {
        "a window, which it has not": ({"sliding_window": 16}, "equal"),
        "sums of weights": ({"norm_topk_prob": False}, "equal"),
        "clipping": ({"clip_qkv": 0.1}, HERE),
    },
    "gpt_oss": {
        "another window": ({"sliding_window": 9}, "equal"),
        "another limit": ({"swiglu_limit": 0.3}, "equal"),
        "another gain": ({"swiglu_alpha": 1.5}, HERE),
        "layers without windows": ({"layer_types": ["full_attention"] * 2}, "equal"),
        "too few kinds of layers": ({"layer_types": ["full_attention"]}, None),
        "nothing of positions": (PLAIN, "equal"),
        "no biases": ({"attention_bias": False}, None),
    },
    "V3, yarn, no groups": {"one expert": ({"num_experts_per_tok": 1}, HERE)},
    "V2-Lite": {"one expert": ({"num_experts_per_tok": 1}, "equal")},
    "V3": {
        "another scale": ({"routed_scaling_factor": 1.0}, "equal"),
        "fewer groups": ({"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}, "equal"),
        "one group": ({"n_group": 1, "topk_group": 1}, "equal"),
        "groups of two sizes": ({"n_group": 3}, None),
        "groups of one expert": ({"n_group": 8, "topk_group": 2}, None),
        "more groups than there are": ({"topk_group": 5}, None),
        "all groups": ({"topk_group": 4}, "equal"),
        "heads without keys": ({"num_key_value_heads": 3}, None),
        "weights as they are": ({"norm_topk_prob": False}, HERE),
    },
}
"""Family -> what config.json says otherwise, and what becomes of it; None is refused on either side."""


def kinds(name):
    """The keys of `SAID` that speak of a model."""
    return [kind for kind in ("all", "qwen", name) if kind in SAID and (kind != "qwen" or "qwen" in name)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "kind", "said"),
    [(name, kind, said) for name in BASES for kind in kinds(name) for said in SAID[kind]],
    indirect=["base"],
)
def test_what_is_said_otherwise_is_as_in_transformers_or_refused(base, kind, said):
    changes, expected = SAID[kind][said]
    found, why = base.outcome(changes)
    assert found == (expected or "refused here, fails there"), why


def test_a_llama_moe_that_says_nothing_is_that_of_its_published_code():
    sizes = {"num_attention_heads": 32, "num_layers": 32, "ffn_hidden_size": 688, "num_moe_experts": 16}
    settings = model_settings({"model_type": "llama_moe"})
    assert (
        settings | {**sizes, "moe_router_topk": 4, "layernorm_epsilon": 1e-6, "router_noise": "training"}
        == settings
    )


def test_what_was_assumed_is_told_where_a_folder_does_not_fit(tmp_path):
    base = Base("mixtral", tmp_path)
    found, why = base.outcome({"num_hidden_layers": ABSENT})
    assert found == "refused here, fails there"
    assert "of what config.json does not say, transformers assumes num_hidden_layers 32" in why
    assert why.count("transformers assumes") == 1 and "hidden_size" not in why


def test_the_table_is_that_of_the_installed_version():
    table = runpy.run_path(str(ROOT / "tools/hugging_face_defaults.py"))["defaults_table"]()
    path = ROOT / "megatron_dynmix/config/hugging_face_defaults.json"
    known = json.loads(path.read_text())
    assert known == table, f"python tools/hugging_face_defaults.py {path.relative_to(ROOT)}"
