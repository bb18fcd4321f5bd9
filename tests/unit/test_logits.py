"""The comparison of logits: whom it believes, whom not, and what it says when there is nothing to compare.

Axes: E experts, F the experts' inner width, H hidden.
"""

import dataclasses
import json
import shutil

import pytest
import torch
from convert_fixtures import InMemory, tiny_folder
from safetensors.torch import load_file, save_file

from megatron_dynmix import platform
from megatron_dynmix.cli import main
from megatron_dynmix.config.presets import complete_model
from megatron_dynmix.convert import export_hf, hf_folder
from megatron_dynmix.convert.hf_folder import HuggingFaceFolder
from megatron_dynmix.convert.logits import choose_layers, compare_logits, fixed_tokens, one_rank
from megatron_dynmix.convert.origin import model_of
from megatron_dynmix.convert.tensors import as_megatron
from megatron_dynmix.convert.weight_map import Block, Side
from megatron_dynmix.errors import EXIT_FAILED

GIB = 2**30


def compare(folder, change_map=None, change_model=None, **arguments):
    """The folder against itself, seen as a checkpoint through its map."""
    weights = HuggingFaceFolder(folder)
    names = weights.weight_map(256)
    checkpoint = as_megatron(weights, change_map(names) if change_map else names)
    model = model_of(complete_model({"preset": None, **weights.settings}))
    if change_model:
        model = change_model(model)
    return compare_logits(folder, weights, checkpoint, model, **arguments)


@pytest.mark.parametrize("fused", [False, True], ids=["per expert", "fused"])
def test_a_right_conversion_passes(fused):
    verdict = compare(tiny_folder("mixtral", fused=fused))
    assert verdict.passed and verdict.why_not is None, verdict.describe()
    assert verdict.layers == (0, 1) and verdict.tokens == 256 and verdict.experts_reached == 1.0
    assert 0 < verdict.max_difference < 0.1 * verdict.tolerance
    assert verdict.top1_agreement == 1.0
    assert verdict.describe().startswith("equal: logits of 256 tokens through all 2 layers differ")


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("mixtral", {"num_hidden_layers": 6}),
        ("qwen2_moe", {"num_hidden_layers": 5, "decoder_sparse_step": 2, "tie_word_embeddings": True}),
        ("qwen3_moe", {"num_hidden_layers": 6, "mlp_only_layers": [0, 5]}),
    ],
    ids=["stacked layers", "every second layer dense", "first and last layer dense"],
)
def test_a_large_model_is_compared_by_its_first_middle_and_last_layer(family, layers):
    folder = tiny_folder(family, dtype="bfloat16", **layers)
    verdict = compare(folder, limit=1000)
    last = layers["num_hidden_layers"] - 1
    assert verdict.layers == (0, last // 2, last) and verdict.num_layers == last + 1
    assert verdict.passed, verdict.describe()


def test_layers_of_a_cut_model_are_its_own():
    """The middle layer of six with the weights of its neighbour."""

    def neighbour(names):
        return rename(names, lambda name: name.replace("model.layers.2.", "model.layers.3."), "layers.2.")

    folder = tiny_folder("mixtral", num_hidden_layers=6)
    assert not compare(folder, lenient(neighbour), limit=1000).passed


class Lenient:
    """A map whose blocks need not cover each number once."""

    def __init__(self, names, blocks):
        self.hf = names.hf
        self.megatron = Side(names.megatron_shapes, blocks, is_hf=False, padded=names.padded)


def lenient(change):
    return lambda names: Lenient(names, change(names))


def rename(names, new_name, part):
    return [
        dataclasses.replace(block, hf=new_name(block.hf)) if part in block.hf else block
        for block in names.blocks
    ]


def exchanged(names, one, other):
    """The map in which two boxes `(name, offset, shape)` of Hugging Face tensors have changed places."""
    (name, offset, shape), (other_name, other_offset, _) = one, other
    blocks, found = [], 0
    for block in names.blocks:
        place = (block.hf, block.hf_offset)
        if block.shape == shape and place == (name, offset):
            blocks.append(dataclasses.replace(block, hf=other_name, hf_offset=other_offset))
        elif block.shape == shape and place == (other_name, other_offset):
            blocks.append(dataclasses.replace(block, hf=name, hf_offset=offset))
        else:
            blocks.append(block)
            continue
        found += 1
    assert found == 2, f"{found} of the two blocks are in the map"
    return dataclasses.replace(names, blocks=tuple(blocks))


def expert_by_expert(names):
    """The same map with fused experts `[E, 2F, H]` and `[E, H, F]` as boxes of one expert's halves."""
    blocks = []
    for block in names.blocks:
        halves = {"gate_up_proj": 2, "down_proj": 1}.get(block.hf.rsplit(".", 1)[-1])
        if halves is None:
            blocks.append(block)
            continue
        *_, experts, rows, columns = names.hf_shapes[block.hf]
        rows //= halves
        layer = block.megatron_offset[0]
        blocks += [
            Block(block.hf, (e, h * rows, 0), block.megatron, (layer, e, h * rows, 0), (rows, columns))
            for e in range(experts)
            for h in range(halves)
        ]
    return dataclasses.replace(names, blocks=tuple(blocks))


LAYER = "model.layers.1."
EXPERT = LAYER + "block_sparse_moe.experts.{}.{}.weight"
GATE_UP = LAYER + "mlp.experts.gate_up_proj"
DOWN = LAYER + "mlp.experts.down_proj"
QUERY, KEY = (f"{LAYER}self_attn.{kind}_proj.weight" for kind in "qk")
NORMS = [f"{LAYER}{place}_layernorm.weight" for place in ("input", "post_attention")]
HEADS = {"num_key_value_heads": 6}
"""As many keys as queries, so that a query head and its key are boxes of one shape."""
MISTAKES = {
    "gate and up, per expert": (
        {},
        [((EXPERT.format(3, "w1"), (0, 0), (14, 30)), (EXPERT.format(3, "w3"), (0, 0)))],
    ),
    "two experts, per expert": (
        {},
        [
            ((EXPERT.format(2, name), (0, 0), shape), (EXPERT.format(4, name), (0, 0)))
            for name, shape in {"w1": (14, 30), "w3": (14, 30), "w2": (30, 14)}.items()
        ],
    ),
    "gate and up, fused": ({"fused": True}, [((GATE_UP, (3, 0, 0), (14, 30)), (GATE_UP, (3, 14, 0)))]),
    "two experts, fused": (
        {"fused": True},
        [
            ((GATE_UP, (2, 0, 0), (14, 30)), (GATE_UP, (4, 0, 0))),
            ((GATE_UP, (2, 14, 0), (14, 30)), (GATE_UP, (4, 14, 0))),
            ((DOWN, (2, 0, 0), (30, 14)), (DOWN, (4, 0, 0))),
        ],
    ),
    "query heads of two groups": (
        {},
        [
            (
                (LAYER + "self_attn.q_proj.weight", (0, 0), (20, 30)),
                (LAYER + "self_attn.q_proj.weight", (20, 0)),
            )
        ],
    ),
    "a query head and its key": (
        HEADS,
        [
            (
                (LAYER + "self_attn.q_proj.weight", (0, 0), (10, 30)),
                (LAYER + "self_attn.k_proj.weight", (0, 0)),
            )
        ],
    ),
    "the two norms": (
        {},
        [
            (
                (LAYER + "input_layernorm.weight", (0,), (30,)),
                (LAYER + "post_attention_layernorm.weight", (0,)),
            )
        ],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_map_is_seen(mistake):
    changes, exchanges = MISTAKES[mistake]

    verdict = compare(tiny_folder("mixtral", **changes), lambda names: with_mistake(names, exchanges))
    assert not verdict.passed
    assert verdict.max_difference > 100 * verdict.tolerance, verdict.describe()
    assert verdict.describe().startswith("FAILED: logits of 256 tokens")


def with_mistake(names, exchanges):
    names = expert_by_expert(names)
    for one, other in exchanges:
        names = exchanged(names, one, (*other, None))
    return names


@pytest.mark.parametrize("mistake", ["gate and up, per expert", "two experts, fused"])
@pytest.mark.parametrize(
    "command",
    [["hf-to-megatron"], ["hf-to-megatron", "--dtype", "bf16"], ["megatron-to-hf"]],
    ids=" ".join,
)
def test_the_command_fails_on_a_mistake_in_a_map(mistake, command, tmp_path, monkeypatch, capsys):
    """Values are read back through the same map, so they agree; logits do not."""
    changes, exchanges = MISTAKES[mistake]
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    source = tiny_folder("mixtral", **changes)
    if command == ["megatron-to-hf"]:
        assert main(["convert", "hf-to-megatron", str(source), str(right), "--no-verify"]) == 0
        source = right
    for module in (hf_folder, export_hf):
        right_map = module.weight_map
        monkeypatch.setattr(
            module,
            "weight_map",
            lambda *given, f=right_map, **more: with_mistake(f(*given, **more), exchanges),
        )
    assert main(["convert", *command, str(source), str(wrong)]) == EXIT_FAILED
    said = capsys.readouterr().out
    assert "FAILED: logits of 256 tokens" in said and "values differ" not in said
    assert "NOT CONVERTED" in said
    assert not wrong.exists()


def test_halves_of_fused_experts_are_the_same_map():
    assert compare(tiny_folder("mixtral", fused=True), expert_by_expert).passed


@pytest.mark.parametrize(
    "setting",
    [{"rotary_base": 5e5}, {"moe_router_pre_softmax": True}, {"layernorm_epsilon": 1e-3}],
    ids=lambda setting: next(iter(setting)),
)
def test_a_setting_that_says_another_model_is_seen(setting):
    def other(model):
        own = {name: value for name, value in setting.items() if hasattr(model, name)}
        rest = {name: value for name, value in setting.items() if name not in own}
        return dataclasses.replace(model, **own, megatron={**model.megatron, **rest})

    assert not compare(tiny_folder("mixtral"), change_model=other).passed


def test_how_a_model_is_trained_is_no_difference():
    def trained(model):
        how = {
            "moe_expert_capacity_factor": 0.5,
            "moe_input_jitter_eps": 0.1,
            "hidden_dropout": 0.5,
            "recompute_granularity": "selective",
            "num_layers_in_first_pipeline_stage": 1,
        }
        return dataclasses.replace(model, megatron={**model.megatron, **how})

    verdict = compare(tiny_folder("mixtral"), change_model=trained)
    assert verdict.passed, verdict.describe()


def copied(folder, tmp_path, **config):
    """A folder's copy whose config.json says something else."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return copy


def file_with(name, folder):
    """The file of a folder that holds a tensor, and all that it holds."""
    files = ((path, load_file(path)) for path in folder.glob("*.safetensors"))
    return next((path, tensors) for path, tensors in files if name in tensors)


def against(weights, checkpoint, folder=None):
    """A folder as the reference of a checkpoint; that of the weights if no other is given."""
    model = model_of(complete_model({"preset": None, **weights.settings}))
    return compare_logits(folder or weights.path, weights, checkpoint, model)


def against_right_weights(folder, right):
    weights = HuggingFaceFolder(right)
    return against(weights, as_megatron(weights, weights.weight_map()), folder)


def in_memory(held):
    return {name: held.read(name, (0,) * len(shape), shape) for name, shape in held.shapes.items()}


def test_a_model_that_transformers_does_not_know_is_not_compared(tmp_path):
    right = tiny_folder("mixtral")
    code = {"AutoConfig": "configuration.Own", "AutoModelForCausalLM": "modeling.Own"}
    folder = copied(right, tmp_path, model_type="llama_moe", auto_map=code)
    (folder / "configuration.py").write_text("raise SystemExit('this code must not run')")
    verdict = against_right_weights(folder, right)
    assert verdict.passed and verdict.max_difference is None
    assert "has no model of type llama_moe" in verdict.describe()
    assert verdict.describe().startswith("logits not compared: ")


def test_a_model_for_which_there_is_no_memory_is_not_compared():
    verdict = compare(tiny_folder("mixtral"), memory=1000)
    assert verdict.passed and verdict.max_difference is None
    assert "does not fit" in verdict.describe()


def test_another_vocabulary_is_a_reason(tmp_path):
    right = tiny_folder("mixtral")
    verdict = against_right_weights(tiny_folder("mixtral", vocab_size=140), right)
    assert not verdict.passed
    assert "140 tokens by its config.json and 131 in the checkpoint" in verdict.describe()


def test_a_checkpoint_with_fewer_rows_than_tokens_is_a_reason():
    weights = HuggingFaceFolder(tiny_folder("mixtral"))
    held = as_megatron(weights, weights.weight_map())
    tensors = in_memory(held)
    name = "embedding.word_embeddings.weight"
    verdict = against(weights, InMemory({**tensors, name: tensors[name][:100]}))
    assert not verdict.passed
    assert f"{name} is [100, 30], too small for [131, 30]" in verdict.describe()


def test_weights_that_are_not_finite_are_a_reason(tmp_path):
    folder = copied(tiny_folder("mixtral"), tmp_path)
    path, tensors = file_with("model.norm.weight", folder)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    verdict = compare(folder)
    assert not verdict.passed and "are not finite" in verdict.describe()


def test_other_layers_are_a_reason(tmp_path):
    right = tiny_folder("mixtral")
    verdict = against_right_weights(copied(right, tmp_path, num_hidden_layers=3), right)
    assert not verdict.passed and "3 layers by its config.json and 2 in the checkpoint" in verdict.describe()


def test_a_tensor_that_transformers_would_draw_at_random_is_a_reason(tmp_path):
    right = tiny_folder("mixtral")
    folder = copied(right, tmp_path)
    path, tensors = file_with("lm_head.weight", folder)
    del tensors["lm_head.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    del listed["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(listed))
    verdict = against_right_weights(folder, right)
    assert not verdict.passed and "transformers misses lm_head.weight" in verdict.describe()


def test_a_folder_that_transformers_cannot_run_is_a_reason_and_no_traceback(tmp_path):
    right = tiny_folder("mixtral")
    folder = copied(right, tmp_path, hidden_act="no such function")
    verdict = against_right_weights(folder, right)
    assert not verdict.passed and "transformers cannot run" in verdict.describe()
    assert len(verdict.describe().splitlines()) == 1


def test_a_tensor_that_the_checkpoint_lacks_is_a_reason():
    weights = HuggingFaceFolder(tiny_folder("mixtral"))
    tensors = in_memory(as_megatron(weights, weights.weight_map()))
    del tensors["decoder.final_layernorm.weight"]
    verdict = against(weights, InMemory(tensors))
    assert not verdict.passed
    assert verdict.describe() == "FAILED: the checkpoint has no 'decoder.final_layernorm.weight'"


def test_process_groups_that_are_there_stay_and_no_others():
    assert not torch.distributed.is_initialized()
    with one_rank():
        with one_rank():
            assert torch.distributed.get_world_size() == 1
        assert torch.distributed.is_initialized()
        assert compare(tiny_folder("mixtral")).passed
        assert torch.distributed.is_initialized()
    assert not torch.distributed.is_initialized()


def test_tokens_are_the_same_every_time_and_reach_both_ends_of_the_vocabulary():
    tokens_BS = fixed_tokens(50_000, 4096)
    assert tokens_BS.shape == (4, 64)
    assert torch.equal(tokens_BS, fixed_tokens(50_000, 4096))
    assert tokens_BS.min() == 0 and tokens_BS.max() == 49_999
    assert fixed_tokens(50_000, 10).shape == (4, 10)


SHAPES = {"model.embed_tokens.weight": (1000, 100)} | {
    f"model.layers.{layer}.mlp.weight": (1000, 1000) for layer in range(9)
}
"""100 thousand numbers outside the layers, a million in each of nine."""


@pytest.mark.parametrize(
    ("limit", "memory", "layers"),
    [
        (10_000_000, GIB, tuple(range(9))),
        (9_000_000, GIB, (0, 4, 8)),
        (10_000_000, 30_000_000, (0, 4, 8)),
        (10_000_000, 20_000_000, (0, 8)),
        (1, 10_000_000, (8,)),
        (10_000_000, 9_000_000, ()),
    ],
)
def test_layers_that_are_run_follow_from_size_and_memory(limit, memory, layers):
    assert choose_layers(SHAPES, limit=limit, memory=memory) == layers


def test_models_on_the_meta_device_are_built_there():
    """Transformers builds its models so, and computes what they do not store when they are moved off it."""
    assert platform.start()
    with torch.device("meta"):
        tensors = [
            torch.empty(1),
            torch.zeros(1),
            torch.ones(1),
            torch.tensor([1]),
            torch.nn.Linear(2, 2).weight,
        ]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
