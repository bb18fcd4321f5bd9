"""From RUN.yaml and flags to the resolved configuration, and back."""

import dataclasses
import re
from pathlib import Path

import pytest
from config_fixtures import good_settings, load, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_dynmix.config.decided import DECIDED, OVERRULED
from megatron_dynmix.config.leaves import FLAG_ALIASES, all_leaves, find, is_usual
from megatron_dynmix.config.load import load_config, to_dict, to_yaml
from megatron_dynmix.config.megatron import ddp_config, moe_layers, optimizer_config, transformer_config
from megatron_dynmix.config.megatron_fields import megatron_fields
from megatron_dynmix.config.presets import PRESETS
from megatron_dynmix.errors import InputError


def test_an_empty_file_is_the_tiny_preset(tmp_path):
    config = load(tmp_path, "")
    assert config.model.preset == "tiny" and config.model.vocab_size == 4096
    assert config.data.prepared_dir == str(tmp_path / "prepared")


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    content = {"model": {"num_layers": 3}, "optimizer": {"lr": 1.0}, "training": {"train_iters": 5}}
    config = load(tmp_path, content, ["--lr", "0.5", "--hidden-size=64"])
    assert config.optimizer.lr == 0.5 and config.training.train_iters == 5
    assert config.model.megatron["num_layers"] == 3 and config.model.megatron["hidden_size"] == 64


def test_paths_are_relative_to_the_file_and_in_flags_to_the_current_folder(tmp_path, monkeypatch):
    folder, here = tmp_path / "runs", tmp_path / "here"
    folder.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    content = {"data": {"tokenizer": "tok", "sources": {"a": {"path": "a.jsonl", "probe": "../p.jsonl"}}}}
    config = load(folder, content, ["--pretrained-checkpoint", "2024", "--prepared-dir", "out"])
    assert config.data.tokenizer == str(folder / "tok")
    assert config.data.sources["a"].path == str(folder / "a.jsonl")
    assert config.data.sources["a"].probe == str(tmp_path / "p.jsonl")
    assert config.checkpoint.pretrained_checkpoint == str(here / "2024")
    assert config.data.prepared_dir == str(here / "out")


def test_a_path_may_be_taken_back_by_a_flag(tmp_path):
    assert load(tmp_path, {"data": {"tokenizer": "tok"}}, ["--tokenizer", "null"]).data.tokenizer is None


def test_environment_variables_and_home_stand_for_their_values(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", str(tmp_path / "d"))
    monkeypatch.setenv("HOME", str(tmp_path / "h"))
    content = {"data": {"tokenizer": "~/tok", "sources": {"a": {"path": "${DATA}/a.jsonl"}}}}
    config = load(tmp_path, content)
    assert config.data.sources["a"].path == str(tmp_path / "d" / "a.jsonl")
    assert config.data.tokenizer == str(tmp_path / "h" / "tok")


def test_an_environment_variable_that_is_not_set_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(InputError, match="the variable NOWHERE is not set; export it first"):
        load(tmp_path, {"data": {"tokenizer": "${NOWHERE}/tok"}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("modle: {}", "modle is no section; did you mean model?"),
        ("model: {num_layer: 2}", "in section model: num_layer is no setting; did you mean num_layers?"),
        ("training: {lr: 1.0}", "training.lr is in the wrong section; put lr under optimizer"),
        ("training: {seed: 1, seed: 2}", "the key 'seed' is given twice"),
        ("data: {sources: {a: {path: x}, a: {path: y}}}", "the key 'a' is given twice"),
        (
            "training: {train_iters: many}",
            "training.train_iters is 'many'; it must be a whole number or null",
        ),
        ("training: {train_iters: 2.5}", "training.train_iters is 2.5; it must be a whole number or null"),
        ("training: {seed: true}", "training.seed is True; it must be a whole number"),
        ("training: {bf16: 1}", "training.bf16 is 1; it must be true or false"),
        ("optimizer: {lr: fast}", "optimizer.lr is 'fast'; it must be a number"),
        ("optimizer: {lr: -1}", "optimizer.lr is -1.0; it must be a positive number"),
        ("optimizer: {lr: .nan}", "optimizer.lr is nan; it must be a positive number"),
        ("optimizer: {lr: 1, min_lr: 2}", "optimizer.min_lr is 2.0; it must be from 0 to lr (1.0)"),
        (
            "mixing: {layers: 3}",
            "it must be text or a list whose items are each a whole number",
        ),
        ("mixing: {shadow: odm}", "it must be a list whose items are each text or a mapping {name: value}"),
        ("mixing: {strategy_options: 3}", "it must be a mapping {name: value}"),
        ("mixing: {strategy: best}", "'best'; it must be one of gate-load, "),
        ("data: {overlong: keep}", "'keep'; it must be one of drop, truncate, split, error"),
        ("data: {num_workers: -1}", "data.num_workers is -1; it must be 0 or more"),
        ("data: {sources: []}", "data.sources holds []; it must hold at least one source"),
        ("data: {sources: {a: a.jsonl}}", "data.sources.a holds 'a.jsonl'; it must hold a path"),
        ("data: {sources: {a: {path: x, wieght: 1}}}", "no setting of a source; did you mean weight?"),
        ("data: {sources: {a: {path: x, weight: -1}}}", "-1.0; it must be a finite number, 0 or more"),
        ("data: {sources: {a: {path: x, weight: .nan}}}", "nan; it must be a finite number, 0 or more"),
        ("data: {sources: {a.probe: {path: x}}}", "call the source otherwise"),
        ("data: {sources: {a/b: {path: x}}}", "a source's name may hold letters, digits and . _ - only"),
        ("data: {sources: {a b: {path: x}}}", "those of any script, not 'a b'"),
        ("data: {sources: {数学😀: {path: x}}}", "those of any script, not '数学😀'"),
        ('data: {sources: {"код\\u200b": {path: x}}}', "those of any script"),
        ('data: {sources: {"\\u0301a": {path: x}}}', "those of any script"),
        ("data: {sources: {код²: {path: x}}}", "those of any script"),
        ('data: {sources: {"": {path: x}}}', "those of any script"),
        ('data: {sources: {"e\\u0301t": {path: x}}}', "decomposed (Unicode NFD)"),
        (
            "data: {sources: {код: {path: x}, Код: {path: y}}}",
            "there is a source код, too, and a disk",
        ),
        ("data: {sources: {straße: {path: x}, STRASSE: {path: y}}}", "there is a source straße, too"),
        (f"data: {{sources: {{{'数' * 67}: {{path: x}}}}}}", "the name has 201 bytes"),
        ("data: {sources: {код.Probe: {path: x}}}", "call the source otherwise"),
        ("data: {sources: {on: {path: x}}}", "read as True, not as text; put it in quotes"),
        ("data: {sources: {010: {path: x}}}", "read as 8, not as text; put it in quotes"),
        (
            "parallel: {tensor_model_parallel_size: 0}",
            "tensor_model_parallel_size is 0; it must be 1 or more",
        ),
        ("model: {preset: mixtral}", "model.preset is 'mixtral'; it must be one of tiny, mixtral-8x7b"),
        ("model: 3", "section model holds 3; it must hold settings by name"),
        ("[1, 2]", "it holds list; it must hold sections: model, parallel"),
        ("model: {", "it is not valid YAML"),
    ],
)
def test_what_a_file_cannot_hold(tmp_path, content, message):
    with pytest.raises(InputError, match=re.escape(message)):
        load(tmp_path, content)


NAMES = ["数学", "код", "हिन्दी", "كود", "ไทย", "código", "ΑΒΓ-1", "日本語.v2", "데이터", "١٢٣", "Code_2.x-y"]


def test_names_of_sources_are_letters_of_any_script(tmp_path):
    content = good_settings(tmp_path)
    path = next(iter(content["data"]["sources"].values()))["path"]
    content["data"]["sources"] = {name: {"path": path} for name in NAMES}
    config = load(tmp_path, content)
    assert list(config.data.sources) == NAMES
    assert load(tmp_path, to_yaml(config)) == config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seq-lenght", "4"], "--seq-lenght is an unknown flag; did you mean --seq-length?"),
        (["--micro-batch", "4"], "--micro-batch is an unknown flag; did you mean --micro-batch-size?"),
        (["stray"], "stray is an unknown argument"),
        (["--lr"], "argument --lr: expected one argument"),
        (["--train-iters", "1e3"], "--train-iters is '1e3'; it must be a whole number or null"),
        (["--bf16", "yes please"], "--bf16 is 'yes please'; it must be true or false"),
        (["--moe-router-dtype", "fp8"], "--moe-router-dtype is 'fp8'; it must be one of fp32, fp64 or null"),
    ],
)
def test_what_a_flag_cannot_be(tmp_path, flags, message):
    with pytest.raises(InputError, match=re.escape(message)):
        load(tmp_path, "", flags)


def test_no_name_is_proposed_that_is_unlike_the_flag(tmp_path):
    with pytest.raises(InputError, match=r"--learning-rate is an unknown flag$"):
        load(tmp_path, "", ["--learning-rate", "4"])


def test_no_such_file_and_no_text_file(tmp_path):
    with pytest.raises(InputError, match=r"gone\.yaml: there is no such file; give the path of a RUN\.yaml"):
        load_config(tmp_path / "gone.yaml")
    with pytest.raises(InputError, match="cannot be read as a UTF-8 text file"):
        load_config(tmp_path)


def test_yaml_text_that_means_a_number_is_one(tmp_path):
    assert load(tmp_path, "optimizer: {lr: 2e-5}").optimizer.lr == 2e-5
    assert load(tmp_path, "", ["--lr", "2e-5"]).optimizer.lr == 2e-5


def test_bool_flags_set_and_unset(tmp_path):
    assert load(tmp_path, "", ["--bf16"]).training.bf16
    assert not load(tmp_path, "training: {bf16: true}", ["--no-bf16"]).training.bf16
    assert not load(tmp_path, "", ["--no-use-distributed-optimizer"]).parallel.use_distributed_optimizer


def test_lists_are_written_as_in_yaml(tmp_path):
    assert load(tmp_path, "", ["--layers", "[0, 1]"]).mixing.options["layers"] == [0, 1]
    assert load(tmp_path, "mixing: {layers: [1]}").mixing.options["layers"] == [1]
    assert load(tmp_path, "", ["--layers", "all"]).mixing.options["layers"] == "all"


@pytest.mark.parametrize(
    ("flags", "section", "name", "value"),
    [
        (["--num-experts", "16"], "model", "num_moe_experts", 16),
        (["--norm-epsilon", "1e-3"], "model", "layernorm_epsilon", 1e-3),
        (["--no-swiglu"], "model", "gated_linear_unit", False),
        (["--swiglu"], "model", "gated_linear_unit", True),
        (["--disable-bias-linear"], "model", "add_bias_linear", False),
    ],
)
def test_names_of_megatron_lm_are_understood(tmp_path, flags, section, name, value):
    other = {"model": {"gated_linear_unit": not value, "add_bias_linear": True}}
    assert to_dict(load(tmp_path, other, flags))[section][name] == value


def test_every_alias_names_a_setting():
    assert {target.removeprefix("no-") for target in FLAG_ALIASES.values()} <= all_leaves().keys()


def test_what_is_decided_is_refused_by_name():
    for name, why in DECIDED.items():
        with pytest.raises(InputError, match=re.escape(f"{name} cannot be set: {why}")):
            find(name)


@pytest.mark.parametrize("name", ["qk_clip", "fp16", "tp_comm_overlap", "loss_scale", "use_te_rng_tracker"])
def test_what_is_decided_is_refused_in_the_file_and_as_a_flag(tmp_path, name):
    leaf = all_leaves()[name]
    with pytest.raises(InputError, match=re.escape(f"{name} cannot be set: {DECIDED[name]}")):
        load(tmp_path, f"{leaf.section}: {{{name}: true}}")
    flag = [f"--{name.replace('_', '-')}"] + ([] if leaf.hint is bool else ["1"])
    with pytest.raises(InputError, match=re.escape(f"{name} cannot be set: {DECIDED[name]}")):
        load(tmp_path, "", flag)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("fp16", False),
            ("qk_clip_alpha", 0.5),
            ("mtp_num_layers", None),
        ),
        *(("tp_comm_overlap", False), ("initial_loss_scale", 2**32), ("barrier_with_L1_time", True)),
    ],
)
def test_what_is_decided_may_be_given_as_megatron_core_has_it_and_is_no_part_of_the_run(
    tmp_path, name, value
):
    leaf, plain = all_leaves()[name], load(tmp_path, "")
    text = "null" if value is None else str(value).lower()
    assert load(tmp_path, f"{leaf.section}: {{{name}: {text}}}") == plain
    flag = name.replace("_", "-")
    given = [f"--{flag}", text] if leaf.hint is not bool else [f"--{flag}" if value else f"--no-{flag}"]
    assert load(tmp_path, "", given) == plain
    with pytest.raises(InputError, match="is in the wrong section"):
        load(tmp_path, f"data: {{{name}: {text}}}")


@pytest.mark.parametrize("name", OVERRULED)
def test_a_default_that_no_run_has_is_refused_too(tmp_path, name):
    default = next(fields[name] for fields in megatron_fields().values() if name in fields).default
    assert not is_usual(name, default)
    with pytest.raises(InputError, match=f"{name} cannot be set"):
        load(tmp_path, {all_leaves()[name].section: {name: default}})


def test_round_trip_of_a_whole_configuration(tmp_path):
    content = good_settings(tmp_path)
    content["data"]["sources"]["chat"]["weight"] = 0.1
    content["data"]["sources"]["1"] = {"path": "one.jsonl"}
    content["mixing"]["layers"] = [0, 1]
    flags = ["--attention-backend", "unfused", "--bf16", "--adam-beta2", "0.95", "--sequence-parallel"]
    config = load(tmp_path, content, flags)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert load(elsewhere, to_yaml(config)) == config


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lr=st.floats(1e-12, 1e3),
    seed=st.integers(0, 2**63),
    interval=st.integers(1, 10**9),
    weight=st.floats(0, 1e300),
    layers=st.sampled_from(["last", "all"]) | st.lists(st.integers(0, 99), min_size=1),
    tokenizer=st.text(st.characters(codec="utf-8", exclude_categories=["C"], exclude_characters="$~/")),
)
def test_round_trip_of_any_values(tmp_path, lr, seed, interval, weight, layers, tokenizer):
    config = load(tmp_path, good_settings(tmp_path))
    source = dataclasses.replace(config.data.sources["chat"], weight=weight)
    changed = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, lr=lr),
        training=dataclasses.replace(config.training, seed=seed),
        mixing=dataclasses.replace(config.mixing, interval=interval, options={"layers": layers}),
        data=dataclasses.replace(
            config.data, tokenizer=str(Path("/") / tokenizer), sources={"chat": source, "1e3": source}
        ),
    )
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(changed), encoding="utf-8")
    assert load_config(path) == changed


def parameters(config) -> int:
    """Of the pre-norm SwiGLU MoE decoder that `config` describes, from the sizes alone."""
    model = transformer_config(config)
    hidden, vocab = model.hidden_size, config.model.vocab_size
    query = model.num_attention_heads * model.kv_channels
    key_value = model.num_query_groups * model.kv_channels
    attention = hidden * query + 2 * hidden * key_value + query * hidden
    if model.qk_layernorm:
        full = config.model.qk_layernorm_full_width
        attention += query + key_value if full else 2 * model.kv_channels
    expert = 3 * hidden * (model.moe_ffn_hidden_size or model.ffn_hidden_size)
    moe = model.num_moe_experts * expert + hidden * model.num_moe_experts
    layer = attention + moe + 2 * hidden
    head = vocab * hidden if config.model.untie_embeddings_and_output_weights else 0
    return vocab * hidden + model.num_layers * layer + hidden + head


@pytest.mark.filterwarnings("ignore:moe_ffn_hidden_size")
@pytest.mark.parametrize(
    ("preset", "total"),
    [
        ("mixtral-8x7b", 46_702_792_704),
        ("mixtral-8x22b", 140_620_634_112),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("olmoe-1b-7b", 6_919_161_856),
    ],
)
def test_presets_have_the_published_number_of_parameters(tmp_path, preset, total):
    config = load(tmp_path, {"model": {"preset": preset}})
    assert not transformer_config(config).add_bias_linear
    assert parameters(config) == total


DENSE_FIRST = {
    **{"glm-4.5-air": 1, "glm-4.5": 3, "glm-4.6": 3, "glm-4.7-flash": 1},
    **{"kimi-k2": 1, "moonlight-16b-a3b": 1, "dots.llm1": 1},
}
"""Preset -> its first layers that have no experts, as published."""


@pytest.mark.filterwarnings("ignore:moe_ffn_hidden_size")
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_taken_by_megatron_core(tmp_path, preset):
    config = load(tmp_path, {"model": {"preset": preset}})
    model = transformer_config(config)
    dense = DENSE_FIRST.get(preset, 0)
    assert moe_layers(model) == list(range(dense, model.num_layers))
    assert model.calculate_per_token_loss


@pytest.mark.filterwarnings("ignore:moe_ffn_hidden_size")
@pytest.mark.parametrize(
    ("setting", "layers"),
    [("moe_layer_freq: 2", [0, 2]), ("moe_layer_freq: [0, 0, 1, 1]", [2, 3]), ("num_moe_experts: null", [])],
)
def test_moe_layers_follow_the_frequency(tmp_path, setting, layers):
    config = load(tmp_path, f"model: {{num_layers: 4, {setting}}}")
    assert moe_layers(transformer_config(config)) == layers


def test_settings_reach_megatron_core(tmp_path):
    flags = ["--bf16", "--lr", "0.1", "--clip-grad", "0.7", "--overlap-grad-reduce"]
    config = load(tmp_path, "", flags)
    optimizer, ddp = optimizer_config(config), ddp_config(config)
    assert (optimizer.lr, optimizer.clip_grad, optimizer.bf16) == (0.1, 0.7, True)
    assert ddp.overlap_grad_reduce and ddp.grad_reduce_in_fp32 and ddp.use_distributed_optimizer


def test_sections_are_frozen(tmp_path):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config(write(tmp_path, "")).training.seed = 3


def test_another_strategy_by_flag_begins_from_its_own_defaults_and_says_so(tmp_path, capsys):
    path = write(tmp_path, "mixing: {strategy: gate-load, eta: 3, metric: cos, interval: 7}")
    mixing = load_config(path, ["--strategy", "ref-loss"]).mixing
    assert (mixing.options["eta"], mixing.interval) == (1.0, 7)
    assert "eta 3.0, metric cos: left out, it is for strategy gate-load" in capsys.readouterr().err
    assert load_config(path, ["--strategy", "uniform"]).mixing.options == {}
    kept = load_config(path, ["--strategy", "gate-load", "--eta", "2"]).mixing.options
    assert (kept["eta"], kept["metric"]) == (2.0, "cos")
    capsys.readouterr()
    assert load_config(path).mixing.options["eta"] == 3.0
    assert not capsys.readouterr().err
