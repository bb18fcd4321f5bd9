"""What is known of Megatron-Core's settings without importing it."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from config_fixtures import good_settings, write

from megatron_dynmix.config import megatron_fields as fields
from megatron_dynmix.config.megatron_fields import (
    OLDEST,
    installed,
    megatron_fields,
    model_settings,
    moe_layers,
)
from megatron_dynmix.config.run_config import RunConfig
from megatron_dynmix.errors import InputError

ROOT = Path(__file__).parents[2]
REFUSE = """
import sys
from megatron_dynmix.cli import main
code = main(sys.argv[1:])
sys.exit(f"imported {loaded}" if (loaded := {"torch", "megatron.core"} & sys.modules.keys()) else code)
"""


def test_the_tables_are_those_of_the_installed_version():
    tool = runpy.run_path(str(ROOT / "tools/megatron_fields.py"))
    table = json.loads(json.dumps(tool["megatron_table"]()))
    folder, release = ROOT / "megatron_dynmix/config", installed()[0]
    oldest = json.loads((folder / "megatron_fields.json").read_text())
    command = f"python tools/megatron_fields.py {folder.relative_to(ROOT)}"
    if release == OLDEST:
        assert table == oldest, command
    else:
        versions = json.loads((folder / "megatron_versions.json").read_text())
        assert versions[release] == tool["difference"](table, oldest), command


@pytest.mark.parametrize(
    ("release", "name", "why"),
    [
        ("0.16", "moe_use_legacy_grouped_gemm", None),
        ("0.17", "moe_use_legacy_grouped_gemm", "megatron-core 0.17.9 is installed, and only 0.16 has it"),
        ("0.19", "moe_use_legacy_grouped_gemm", "megatron-core 0.19.9 is installed, and only 0.16 has it"),
        ("0.17", "muon_use_nesterov", None),
        ("0.18", "muon_use_nesterov", "megatron-core 0.18.9 is installed, and only 0.16 to 0.17 has it"),
        ("0.16", "use_mup", "it came with megatron-core 0.17"),
        ("0.19", "use_mup", "it came with megatron-core 0.17"),
        ("0.16", "gtp_weight_remat_size", "it came with megatron-core 0.19"),
        ("0.19", "moe_router_topk", None),
        ("0.16", "fp32_residual_connection", "megatron-core 0.16.9 rounds the residual after every addition"),
        ("0.17", "fp32_residual_connection", None),
    ],
)
def test_a_field_of_another_version_has_a_reason(release, name, why, monkeypatch):
    monkeypatch.setattr(fields, "installed", lambda: (release, f"{release}.9"))
    reasons = fields.unavailable_fields.__wrapped__()
    assert reasons.get(name, "").startswith(why) if why else name not in reasons


@pytest.mark.parametrize("release", ["0.15", "0.20", "1.0"])
def test_a_version_that_is_not_known_is_refused(release, monkeypatch):
    monkeypatch.setattr(fields, "installed", lambda: (release, f"{release}.0"))
    with pytest.raises(InputError, match=rf"megatron-core {release}\.0 is installed.*0\.16\.1 to 0\.19"):
        fields.unavailable_fields.__wrapped__()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--use-mup", "use_mup cannot be set: it came with megatron-core 0.17"),
        ("--no-use-mup", "use_mup cannot be set: it came with megatron-core 0.17"),
        ("--gtp-weight-remat-size=2", "gtp_weight_remat_size cannot be set: it came with megatron-core 0.19"),
        ("--moe-router-topkk 2", "did you mean --moe-router-topk?"),
        ("--moe-router-topk two", "a whole number"),
        ("--attention-backend slow", "one of flash"),
        ("--moe-router-topk 9", "use 1 to 8"),
        ("--moe-layer-freq 0", "moe_layer_freq is 0"),
        ("--q-lora-rank 8", "only multi-latent attention has that"),
        ("--tensor-model-parallel-size 2", "add --sequence-parallel"),
    ],
)
def test_train_refuses_settings_without_torch_or_megatron(flags, message, tmp_path):
    path = write(tmp_path, good_settings(tmp_path))
    command = [sys.executable, "-c", REFUSE, "train", path, "--run-dir", tmp_path / "run"]
    command += ["--nproc-per-node", "2", *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr, done.stderr


def test_defaults_are_filled_in():
    model = model_settings(RunConfig())
    assert (model.moe_router_topk, model.num_moe_experts) == (2, None)
    assert megatron_fields()["OptimizerConfig"]["adam_beta1"].default == 0.9
    assert moe_layers(model) == []
