"""What is known of Megatron-Core's settings without importing it."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from config_fixtures import good_settings, write

from megatron_dynmix.config.megatron_fields import megatron_fields, model_settings, moe_layers
from megatron_dynmix.config.run_config import RunConfig

ROOT = Path(__file__).parents[2]
REFUSE = """
import sys
from megatron_dynmix.cli import main
code = main(sys.argv[1:])
sys.exit(f"imported {loaded}" if (loaded := {"torch", "megatron.core"} & sys.modules.keys()) else code)
"""


def test_the_table_is_that_of_the_installed_version():
    path = ROOT / "megatron_dynmix/config/megatron_fields.json"
    table = runpy.run_path(str(ROOT / "tools/megatron_fields.py"))["megatron_table"]()
    known = json.loads(path.read_text())
    assert known == json.loads(json.dumps(table)), f"python tools/megatron_fields.py {path.relative_to(ROOT)}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
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
