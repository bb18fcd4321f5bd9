"""The command `convert`, both ways on tiny models: what it writes, says and refuses."""

import errno
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from convert_fixtures import tiny_folder
from data_fixtures import tokenizer_dir_fixture  # noqa: F401
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from megatron_dynmix import platform
from megatron_dynmix.checkpoint.folder import checksum, exact, newest_good
from megatron_dynmix.cli import main
from megatron_dynmix.config.load import load_config
from megatron_dynmix.config.presets import other_shape
from megatron_dynmix.convert import conversion, export_hf, tensors, to_megatron
from megatron_dynmix.convert.hf_folder import carried_files
from megatron_dynmix.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_dynmix.convert.staging import partial_of
from megatron_dynmix.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REFUSED
from megatron_dynmix.training.resume import check_pretrained


def convert(direction, source, destination, *flags, verify=False):
    more = [] if verify else ["--no-verify"]
    return main(["convert", direction, str(source), str(destination), *flags, *more])


def loaded(folder: Path):
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(folder, other):
    one, two = loaded(folder), loaded(other)
    assert one.keys() == two.keys()
    differing = [
        name for name in one if not torch.equal(one[name], two[name]) or one[name].dtype != two[name].dtype
    ]
    assert not differing


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer_dir):
    """A tiny Mixtral with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("source") / "tiny"
    shutil.copytree(tiny_folder("mixtral", dtype="bfloat16"), folder)
    shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    destination = tmp_path_factory.mktemp("converted") / "megatron"
    assert convert("hf-to-megatron", source, destination) == 0
    return destination


@pytest.mark.parametrize("fused", [False, True])
def test_there_and_back_gives_the_same_folder(fused, tmp_path, capsys):
    source = tiny_folder("qwen3_moe", fused=fused, tie_word_embeddings=fused)
    assert convert("hf-to-megatron", source, tmp_path / "there", verify=True) == 0
    there = capsys.readouterr().out
    assert convert("megatron-to-hf", tmp_path / "there", tmp_path / "back", verify=True) == 0
    back = capsys.readouterr().out
    assert_same(tmp_path / "back", source)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((source / name).read_text())
    assert "125 rows of zeros added to 131" in there
    assert "125 rows taken off 256" in back
    for said in (there, back):
        assert "holds every value that was read" in said
        assert "equal: logits of 256 tokens" in said
        assert "NO" not in said.split("note:")[0].replace("NOT", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "there"]


def test_a_converted_folder_is_a_checkpoint_that_runs_start_from(source, converted, tmp_path):
    point = newest_good(converted)
    assert exact(point) == converted / "iter_0000000"
    section = yaml.safe_load((converted / "model.yaml").read_text())
    run_yaml = tmp_path / "run.yaml"
    run_yaml.write_text(yaml.safe_dump({**section, "checkpoint": {"pretrained_checkpoint": str(converted)}}))
    check_pretrained(load_config(run_yaml))
    copied = {path.name for path in (converted / "hugging_face").iterdir()}
    assert copied == {path.name for path in source.iterdir() if "safetensors" not in path.name}
    assert copied > {"config.json", "generation_config.json", "tokenizer.json"}
    assert set(MegatronCheckpoint(point.source).dtypes.values()) == {torch.bfloat16}


def test_a_size_that_follows_from_others_need_not_be_said():
    said = {"hidden_size": 36, "num_attention_heads": 6, "ffn_hidden_size": 22, "num_query_groups": 6}
    more = {"kv_channels": 6, "moe_ffn_hidden_size": 22}
    assert other_shape(said, {**said, **more}) == []
    assert other_shape({**said, "num_query_groups": None}, said) == []
    assert other_shape({**said, **more, "kv_channels": 8}, said) == ["kv_channels"]
    assert other_shape({**said, "moe_ffn_hidden_size": 14}, said) == ["moe_ffn_hidden_size"]
    assert other_shape({**said, "num_query_groups": 3}, said) == ["num_query_groups"]
    assert other_shape({**said, "hidden_size": 48}, said) == ["hidden_size"]


@pytest.mark.parametrize("given", ["", "iter_0000000"])
def test_tokenizer_and_settings_come_along(source, converted, tmp_path, given):
    assert convert("megatron-to-hf", converted / given, tmp_path / "hf") == 0
    assert_same(tmp_path / "hf", source)
    beside = {path.name for path in source.iterdir() if "safetensors" not in path.name}
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {*beside, "model.safetensors"}


def test_all_that_goes_with_the_weights_comes_back_byte_for_byte(source, tmp_path):
    published = tmp_path / "published"
    shutil.copytree(source, published)
    (published / "additional_chat_templates").mkdir()
    for name in (
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "README.md",
        "merges.txt",
    ):
        (published / name).write_text(f"{{{{ messages }}}} of {name}\n")
    (published / "generation_config.json").write_text('{"temperature": 0.5,\n "eos_token_id": [2, 3]}')
    assert convert("hf-to-megatron", published, tmp_path / "there") == 0
    assert convert("megatron-to-hf", tmp_path / "there", tmp_path / "back") == 0
    before, after = (
        {name: path.read_bytes() for name, path in carried_files(folder).items() if name != "config.json"}
        for folder in (published, tmp_path / "back")
    )
    assert after == before and {"generation_config.json", "tokenizer.json"} <= after.keys()


def test_files_are_as_long_as_is_wanted(converted, source, tmp_path):
    assert convert("megatron-to-hf", converted, tmp_path / "hf", "--max-shard-size", "20KB") == 0
    files = list((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2
    assert max(path.stat().st_size for path in files) < 24_000, "20 KB of numbers and a header"
    assert_same(tmp_path / "hf", source)


def test_experts_are_laid_out_as_is_wanted(converted, source, tmp_path):
    assert convert("megatron-to-hf", converted, tmp_path / "hf", "--experts", "fused", verify=True) == 0
    fused = loaded(tmp_path / "hf")
    assert fused["model.layers.1.mlp.experts.gate_up_proj"].shape == (6, 28, 30)
    assert convert("hf-to-megatron", tmp_path / "hf", tmp_path / "again") == 0
    assert convert("megatron-to-hf", tmp_path / "again", tmp_path / "back", "--experts", "per-expert") == 0
    assert_same(tmp_path / "back", source)


def test_types_are_cast_and_said(source, tmp_path, capsys):
    assert convert("hf-to-megatron", source, tmp_path / "fp32", "--dtype", "fp32", verify=True) == 0
    assert "equal: logits" in capsys.readouterr().out
    assert convert("megatron-to-hf", tmp_path / "fp32", tmp_path / "hf") == 0
    assert {tensor.dtype for tensor in loaded(tmp_path / "hf").values()} == {torch.float32}
    assert AutoConfig.from_pretrained(tmp_path / "hf").dtype == torch.float32
    assert convert("megatron-to-hf", tmp_path / "fp32", tmp_path / "bf16", "--dtype", "bf16") == 0
    assert_same(tmp_path / "bf16", source)
    assert AutoConfig.from_pretrained(tmp_path / "bf16").dtype == torch.bfloat16


def test_logits_of_rounded_weights_are_compared_with_the_rounded_ones(tmp_path, capsys):
    source = tiny_folder("mixtral")
    assert convert("hf-to-megatron", source, tmp_path / "in", "--dtype", "bf16", verify=True) == 0
    said = capsys.readouterr().out
    assert "equal: logits of 256 tokens through all 2 layers" in said
    assert "both with the rounded weights" in said
    assert convert("hf-to-megatron", source, tmp_path / "fp32", "--dtype", "fp32", verify=True) == 0
    assert "the rounded weights" not in capsys.readouterr().out
    assert convert("megatron-to-hf", tmp_path / "fp32", tmp_path / "out", "--dtype", "bf16", verify=True) == 0
    assert "equal: logits" in capsys.readouterr().out


def test_without_a_comparison_the_verdict_says_so(source, tmp_path, capsys):
    assert convert("hf-to-megatron", source, tmp_path / "out") == 0
    assert "CONVERTED, NOT VERIFIED" in capsys.readouterr().out


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_a_bad_verdict_is_exit_1_and_keeps_the_partial_name(
    direction, source, converted, tmp_path, monkeypatch, capsys
):
    """One number is changed on its way to the disk."""
    compare = conversion.compare_values

    class Wrong:
        def __init__(self, held):
            self.shapes, self.dtypes, self._held = held.shapes, held.dtypes, held

        def read(self, name, offset, shape):
            part = self._held.read(name, offset, shape)
            return part + 1 if name == "model.norm.weight" else part

    monkeypatch.setattr(
        conversion, "compare_values", lambda read, written, *rest: compare(read, Wrong(written), *rest)
    )
    monkeypatch.setattr(conversion, "compare_logits", lambda *_, **__: None)
    given = source if direction == "hf-to-megatron" else converted
    assert convert(direction, given, tmp_path / "out", verify=True) == EXIT_FAILED
    said = capsys.readouterr().out
    assert "values differ in model.norm.weight" in said
    assert "NOT CONVERTED" in said
    assert not (tmp_path / "out").exists()
    assert partial_of(tmp_path / "out").exists()


@pytest.mark.parametrize(("later", "said"), [(20_000, "resuming in"), (30_000, "another size of parts")])
def test_ctrl_c_keeps_what_is_done(later, said, source, tmp_path, monkeypatch, capsys):
    """Unless what goes on cuts the tensors in another way: files of two ways do not make a checkpoint."""
    monkeypatch.setattr(tensors, "BOX_BYTES", 1000)
    monkeypatch.setattr(to_megatron, "PART_BYTES", 20_000)
    finished = to_megatron._finish_part

    def interrupted(place, file, *rest):
        if file.endswith("__2_0.distcp"):
            raise KeyboardInterrupt
        finished(place, file, *rest)

    monkeypatch.setattr(to_megatron, "_finish_part", interrupted)
    assert convert("hf-to-megatron", source, tmp_path / "out") == EXIT_INTERRUPTED
    assert "the same command resumes from there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    monkeypatch.setattr(tensors, "BOX_BYTES", 1000)
    monkeypatch.setattr(to_megatron, "PART_BYTES", later)
    assert convert("hf-to-megatron", source, tmp_path / "out") == 0
    assert said in capsys.readouterr().err
    assert convert("megatron-to-hf", tmp_path / "out", tmp_path / "hf") == 0
    assert_same(tmp_path / "hf", source)


def test_ctrl_c_before_anything_is_written(source, tmp_path, monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(platform, "start", interrupted)
    assert convert("hf-to-megatron", source, tmp_path / "out") == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "megatron-dynmix: interrupted; nothing is half done\n"


def run_state_of(converted, destination, **changes):
    """A checkpoint as a run writes it: no `hugging_face` folder beside, and the run's own settings in it."""
    shutil.copytree(converted / "iter_0000000", destination / "iter_0000000")
    (destination / "latest_checkpointed_iteration.txt").write_text("0")
    path = destination / "iter_0000000" / "run_state.json"
    state = json.loads(path.read_text())
    for section, values in changes.items():
        state["config"].setdefault(section, {}).update(values)
    path.write_text(json.dumps(state))
    sums = destination / "iter_0000000" / "checksums.json"
    sums.write_text(json.dumps({**json.loads(sums.read_text()), "run_state.json": checksum(path)}))


def test_a_run_that_came_from_no_folder_gets_a_config_of_its_own(converted, source, tmp_path):
    run_state_of(converted, tmp_path / "run" / "checkpoints", data={"tokenizer": str(source)})
    assert convert("megatron-to-hf", tmp_path / "run", tmp_path / "hf", verify=True) == 0
    assert_same(tmp_path / "hf", source)
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.model_type == "mixtral"
    assert config.num_local_experts == 6
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert config.eos_token_id == tokenizer.eos_token_id is not None


@pytest.mark.parametrize("how", ["load_hf", "pretrained", "flag"])
def test_a_run_that_came_from_a_folder_gets_its_settings_with_what_training_changed(
    how, converted, source, tmp_path
):
    changes = {"model": {"moe_router_topk": 3}}
    if how == "load_hf":
        changes["model"]["load_hf"] = str(source)
    elif how == "pretrained":
        changes["checkpoint"] = {"pretrained_checkpoint": str(converted)}
    run_state_of(converted, tmp_path / "checkpoints", **changes)
    flags = ["--hf-config", str(source)] if how == "flag" else []
    assert convert("megatron-to-hf", tmp_path / "checkpoints", tmp_path / "hf", *flags) == 0
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert after == {**before, "num_experts_per_tok": 3}
    assert (tmp_path / "hf" / "tokenizer.json").exists()


def refused(capsys, direction, source, destination, *flags):
    capsys.readouterr()
    assert convert(direction, source, destination, *flags) == EXIT_REFUSED
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_what_cannot_be_converted_is_one_message(converted, source, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("")
    out = tmp_path / "out"
    assert "not an empty folder" in refused(capsys, "hf-to-megatron", source, full)
    assert "are both" in refused(capsys, "hf-to-megatron", source, source)
    assert "must be 1 or more" in refused(
        capsys, "hf-to-megatron", source, out, "--make-vocab-size-divisible-by", "0"
    )
    assert "is not a folder" in refused(capsys, "hf-to-megatron", tmp_path / "none", out)
    assert "is not a folder" in refused(capsys, "megatron-to-hf", tmp_path / "none", out)
    assert "holds no checkpoint" in refused(capsys, "megatron-to-hf", source, out)
    assert "cannot be read" in refused(capsys, "megatron-to-hf", converted, out, "--max-shard-size", "big")
    other = tiny_folder("olmoe")
    assert "is not of the model of" in refused(
        capsys, "megatron-to-hf", converted, out, "--hf-config", str(other)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_a_disk_without_room_is_told_before_anything_is_written(
    direction, source, converted, tmp_path, monkeypatch, capsys
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    given = source if direction == "hf-to-megatron" else converted
    assert "out does not fit: 0.00 GB are needed" in refused(capsys, direction, given, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("direction", "module", "name"),
    [
        ("hf-to-megatron", to_megatron, "_write_list"),
        ("hf-to-megatron", conversion, "_write_beside"),
        ("megatron-to-hf", export_hf, "copy_files"),
    ],
)
def test_a_disk_that_becomes_full_leaves_nothing_under_the_name_and_can_be_resumed(
    direction, module, name, source, converted, tmp_path, monkeypatch, capsys
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    given = source if direction == "hf-to-megatron" else converted
    with monkeypatch.context() as patch:
        patch.setattr(module, name, full)
        assert convert(direction, given, tmp_path / "out") == EXIT_REFUSED
        assert "the disk is full: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [partial_of(tmp_path / "out").name]
    assert convert(direction, given, tmp_path / "out") == 0
    assert "files are there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_gone_is_named(converted, tmp_path, capsys):
    run_state_of(converted, tmp_path / "checkpoints", model={"load_hf": str(tmp_path / "gone")})
    error = refused(capsys, "megatron-to-hf", tmp_path / "checkpoints", tmp_path / "hf")
    assert f"{tmp_path / 'gone'}, which is not there any more; give --hf-config" in error


def test_a_checkpoint_of_other_tensors_than_its_settings_is_refused(converted, tmp_path, capsys):
    run_state_of(converted, tmp_path / "a", model={"num_layers": 3})
    flags = ["--hf-config", str(converted / "hugging_face")]
    error = refused(capsys, "megatron-to-hf", tmp_path / "a", tmp_path / "hf", *flags)
    assert "num_layers 3 (there 2)" in error
    run_state_of(converted, tmp_path / "b", model={"num_layers": 3})
    assert "by its settings" in refused(capsys, "megatron-to-hf", tmp_path / "b", tmp_path / "hf")
    run_state_of(converted, tmp_path / "c", model={"untie_embeddings_and_output_weights": False})
    error = refused(capsys, "megatron-to-hf", tmp_path / "c", tmp_path / "hf")
    assert "has more than the model: output_layer.weight" in error


def test_a_damaged_checkpoint_is_refused(converted, tmp_path, capsys):
    run_state_of(converted, tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints" / "iter_0000000"
    (folder / "__0_0.distcp").write_bytes(b"")
    assert "is damaged" in refused(capsys, "megatron-to-hf", folder, tmp_path / "hf")
    assert "is damaged" in refused(capsys, "megatron-to-hf", folder.parent, tmp_path / "hf")


def test_a_number_that_the_disk_changed_is_found_before_it_is_converted(converted, tmp_path, capsys):
    """Read and written would be the same, and both models compute the same."""
    folder = shutil.copytree(converted, tmp_path / "damaged") / "iter_0000000"
    weights = folder / "__0_0.distcp"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert main(["convert", "megatron-to-hf", str(folder), str(tmp_path / "hf")]) == EXIT_REFUSED
    assert "is damaged: __0_0.distcp: expected blake3:" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_how_the_experts_were_laid_out_is_not_guessed(converted, tmp_path, capsys):
    folder = shutil.copytree(converted, tmp_path / "damaged")
    (folder / "conversion.json").write_text("{}")
    error = refused(capsys, "megatron-to-hf", folder, tmp_path / "hf")
    assert "conversion.json does not say how the experts were laid out" in error


def test_help_waits_for_no_heavy_import(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "megatron_dynmix.convert.conversion", None)
    with pytest.raises(SystemExit) as ended:
        main(["convert", "hf-to-megatron", "--help"])
    assert ended.value.code == 0
    assert "--no-verify" in capsys.readouterr().out
