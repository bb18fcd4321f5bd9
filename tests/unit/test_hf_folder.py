"""Opening a Hugging Face folder: what it holds, and one message for each thing that can be wrong with it."""

import json
import shutil
from pathlib import Path

import convert_fixtures as tiny
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dynmix.cli import main
from megatron_dynmix.convert.hf_folder import HuggingFaceFolder, carried_files, copy_files
from megatron_dynmix.convert.weight_files import INDEX
from megatron_dynmix.errors import EXIT_REFUSED, InputError

MAPS = Path("/proc/self/maps")
EMBEDDING = "model.embed_tokens.weight"
ROUTER = "model.layers.0.block_sparse_moe.gate.weight"


@pytest.fixture
def folder(tmp_path):
    """A tiny Mixtral that may be broken."""
    return shutil.copytree(tiny.tiny_folder("mixtral"), tmp_path / "model")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def file_of(folder, name):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_tensors(folder, name, change):
    """Rewrite the file that holds a tensor."""
    path = file_of(folder, name)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_those_that_transformers_wrote(dtype):
    folder = HuggingFaceFolder(tiny.tiny_folder("mixtral", dtype=dtype))
    assert len({*folder.file_of.values()}) > 3 and set(folder.dtypes.values()) == {getattr(torch, dtype)}
    for name, path in folder.file_of.items():
        shape = folder.shapes[name]
        assert torch.equal(folder.read(name, (0,) * len(shape), shape), load_file(path)[name])
    assert not folder.fused_experts and folder.computed == ()


def test_one_file_without_an_index():
    folder = HuggingFaceFolder(tiny.tiny_folder("qwen3_moe", fused=True, shard="1GB"))
    assert {path.name for path in folder.file_of.values()} == {"model.safetensors"} and folder.fused_experts


def test_files_that_go_with_the_weights(folder):
    for name in ("tokenizer.json", "chat_template.jinja", "consolidated.safetensors", ".gitattributes"):
        (folder / name).write_text("{}")
    (folder / "original").mkdir()
    wanted = ["chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json"]
    assert [*carried_files(folder)] == wanted


def test_chat_templates_beside_the_first_come_along(folder, tmp_path):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("{{ messages }}")
    files = carried_files(folder)
    assert [*files][-1] == "additional_chat_templates/tool_use.jinja"
    copy_files(files, tmp_path / "copy")
    assert (tmp_path / "copy/additional_chat_templates/tool_use.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "copy/config.json").is_file()


def test_computed_tensors_are_left_out_and_named(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, EMBEDDING, lambda tensors: tensors.update({name: torch.zeros(5)}))
    edit_index(folder, lambda index: index.update({name: index[EMBEDDING]}))
    opened = HuggingFaceFolder(folder)
    assert opened.computed == (name,) and name not in opened.shapes


def pickled(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def no_weights(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def missing_shard(folder):
    file_of(folder, EMBEDDING).unlink()


def truncated(folder):
    path = file_of(folder, EMBEDDING)
    path.write_bytes(path.read_bytes()[:-7])


def truncated_header(folder):
    path = file_of(folder, EMBEDDING)
    path.write_bytes(path.read_bytes()[:20])


def empty(folder):
    file_of(folder, EMBEDDING).write_bytes(b"")


def pointer(folder):
    file_of(folder, EMBEDDING).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def named_but_absent(folder):
    edit_index(folder, lambda index: index.update({"model.extra.weight": index[EMBEDDING]}))


def held_but_not_named(folder):
    edit_tensors(folder, EMBEDDING, lambda tensors: tensors.update({"model.extra": torch.zeros(2)}))


def in_two_files(folder):
    assert file_of(folder, EMBEDDING) != file_of(folder, ROUTER)
    edit_tensors(folder, ROUTER, lambda tensors: tensors.update({EMBEDDING: torch.zeros(131, 30)}))


def no_such_tensor(folder):
    edit_tensors(folder, ROUTER, lambda tensors: tensors.pop(ROUTER))
    edit_index(folder, lambda index: index.pop(ROUTER))


def one_too_many(folder):
    held_but_not_named(folder)
    edit_index(folder, lambda index: index.update({"model.extra": index[EMBEDDING]}))


def other_shape(folder):
    edit_tensors(folder, ROUTER, lambda tensors: tensors.update({ROUTER: torch.zeros(5, 30)}))


def eight_bit(folder):
    edit_tensors(folder, ROUTER, lambda tensors: tensors.update({ROUTER: tensors[ROUTER].to(torch.int8)}))


def float8(folder):
    edit_tensors(
        folder, ROUTER, lambda tensors: tensors.update({ROUTER: tensors[ROUTER].to(torch.float8_e4m3fn)})
    )


def two_types(folder):
    edit_tensors(folder, ROUTER, lambda tensors: tensors.update({ROUTER: tensors[ROUTER].bfloat16()}))


def tied_with_an_output_layer(folder):
    edit_config(folder, tie_word_embeddings=True)


def one_file_beside_an_index(folder):
    save_file({"model.norm.weight": torch.zeros(30)}, folder / "model.safetensors")


def outside_of_the_folder(folder):
    edit_index(folder, lambda index: index.update({EMBEDDING: "../model.safetensors"}))


BAD = {
    "pickled": (pickled, r"pickle \(pytorch_model.bin\).*save_pretrained"),
    "no weights": (no_weights, "neither model.safetensors nor"),
    "missing shard": (missing_shard, r"is missing model-000.*\d+ files that its index names"),
    "truncated": (truncated, r"model-000.*not whole.*bytes\); fetch it again"),
    "truncated header": (truncated_header, "not whole"),
    "empty": (empty, "not whole"),
    "git lfs": (pointer, "git lfs pull"),
    "named but absent": (named_but_absent, "says that model.extra.weight is in model-000"),
    "held but not named": (held_but_not_named, "holds model.extra, which .* does not name"),
    "in two files": (in_two_files, f"{EMBEDDING} is in both model-000.* and model-000"),
    "a tensor missing": (no_such_tensor, f"holds no {ROUTER}, which the model of"),
    "a tensor too many": (one_too_many, "holds model.extra, which the model .* does not have"),
    "other shape": (other_shape, rf"{ROUTER} is \[5, 30\] in .*model-000.*config.json says \[6, 30\]"),
    "int8": (eight_bit, f"{ROUTER} in .* is of type I8.*quantized"),
    "fp8": (float8, f"{ROUTER} in .* is of type F8_E4M3.*quantized"),
    "two types": (
        two_types,
        "torch.bfloat16 and .*layers.1.*torch.float32.*parts of decoder.layers.mlp.router",
    ),
    "tied, with an output layer": (
        tied_with_an_output_layer,
        "holds lm_head.weight, which is not model.embed_tokens.weight once more.*tie_word_embeddings",
    ),
    "outside of the folder": (outside_of_the_folder, "not a file of this folder"),
    "one file beside an index": (
        one_file_beside_an_index,
        "holds model.safetensors, which its .*index.json does not name",
    ),
    "index": (lambda folder: (folder / INDEX).write_text("{"), "index.json cannot be read"),
    "empty index": (lambda folder: (folder / INDEX).write_text("{}"), "no weight_map"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "broken config": (lambda folder: (folder / "config.json").write_text("["), "cannot be read"),
    "list as config": (lambda folder: (folder / "config.json").write_text("[1]"), "no settings by name"),
    "unknown architecture": (
        lambda folder: edit_config(folder, model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        r"config.json: model_type is 'gpt2'.*MixtralForCausalLM.*Qwen3MoeForCausalLM",
    ),
    "adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "merge it into the model"),
    "gptq": (
        lambda folder: edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantization_config says gptq",
    ),
    "config of another model": (
        lambda folder: edit_config(folder, num_local_experts=8),
        r"block_sparse_moe.gate.weight is \[6, 30\] in .*config.json says \[8, 30\]",
    ),
    "fewer layers": (lambda folder: edit_config(folder, num_hidden_layers=1), "holds model.layers.1.*lost"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_refused_in_one_message(name, folder, tmp_path, capsys):
    break_it, message = BAD[name]
    break_it(folder)
    with pytest.raises(InputError, match=message) as raised:
        HuggingFaceFolder(folder)
    assert main(["convert", "hf-to-megatron", str(folder), str(tmp_path / "out")]) == EXIT_REFUSED
    error = capsys.readouterr().err
    assert str(raised.value) in error and error.count("\n") == 1, "one message"
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing is begun"


def test_no_folder(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        HuggingFaceFolder(tmp_path / "nowhere")


def mapped(folder):
    """Files of a folder that are mapped into this process."""
    lines = MAPS.read_text().splitlines()
    return {line.split("/")[-1] for line in lines if str(folder) in line}


@pytest.mark.skipif(not MAPS.exists(), reason="Linux tells what is mapped")
def test_only_one_file_is_open_at_a_time(folder):
    opened = HuggingFaceFolder(folder)
    opened.read(EMBEDDING, (0, 0), (2, 3))
    opened.read(ROUTER, (0, 0), (2, 3))
    assert mapped(folder) == {file_of(folder, ROUTER).name}
    del opened
    assert not mapped(folder)
