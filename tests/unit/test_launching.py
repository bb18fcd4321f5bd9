"""Job scripts, launchers and manifests: what they ask for; the examples' are what the command writes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from config_fixtures import good_settings, write
from data_fixtures import tokenizer_dir_fixture  # noqa: F401

from megatron_dynmix.cli import main
from megatron_dynmix.config.hugging_face import hugging_face_config
from megatron_dynmix.config.presets import COMMON, PRESETS

ROOT = Path(__file__).parents[2]
EXAMPLES = {
    "mixtral_8x7b": ("mixtral-8x7b", 8, 8),
    "mixtral_8x22b": ("mixtral-8x22b", 16, 8),
    "qwen3_30b_a3b": ("qwen3-30b-a3b", 4, 8),
    "llama_moe_paper": ("llama-moe-3.5b-2-8", 1, 4),
    "molm_paper": ("molm-700m-4b", 1, 4),
}
"""Example -> its model, and the nodes and GPUs on each of them that it is written for."""
LARGE = [name for name in EXAMPLES if not name.endswith("_paper")]
"""Those whose READMEs say what to change for fewer GPUs."""
SCRIPTS = sorted(
    path
    for folder in ("examples", "tools", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".sh", ".sbatch")
)
SOURCES = ("chat", "general", "math", "code")


def after(words, flag):
    return words[words.index(flag) + 1]


@pytest.fixture
def places(tmp_path, tokenizer_dir, monkeypatch):
    """A copy of the examples to stand in, with models (no weights) and sources where their variables say."""
    for source in SOURCES:
        (tmp_path / "data" / source).mkdir(parents=True)
        for file in ("train.jsonl", "dev.jsonl"):
            (tmp_path / "data" / source / file).touch()
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")

    def model(preset):
        folder = shutil.copytree(tokenizer_dir, tmp_path / preset)
        settings = {**COMMON, **PRESETS[preset]}
        (folder / "config.json").write_text(json.dumps(hugging_face_config(settings)))
        for name in ("MIXTRAL", "QWEN3", "LLAMA_MOE", "MOLM"):
            monkeypatch.setenv(name, str(folder))

    return model


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_can_run_on_its_nodes_and_its_job_script_is_what_the_command_writes(
    example, places, capsys
):
    preset, nodes, gpus = EXAMPLES[example]
    places(preset)
    script = Path("examples", example, "train.sbatch")
    text = script.read_text()
    (line,) = re.findall(r"^# Written by: megatron-dynmix (.*)$", text, re.MULTILINE)
    words = line.split()
    assert words[:3] == ["launch", "slurm", f"examples/{example}/RUN.yaml"]
    assert [after(words, "--nodes"), after(words, "--gpus-per-node")] == [str(nodes), str(gpus)]
    script.unlink()
    assert main(words) == 0
    assert f"sbatch {script}" in capsys.readouterr().out
    assert script.read_bytes() == text.encode()


@pytest.mark.parametrize("example", LARGE)
def test_an_example_fits_into_80_gib_without_the_model_at_hand_and_its_readme_says_how(
    example, monkeypatch, capsys
):
    for name in ("MIXTRAL", "QWEN3", "DATA"):
        monkeypatch.setenv(name, "/not/here")
    monkeypatch.chdir(ROOT / "examples" / example)
    readme = Path("README.md").read_text()
    figures = re.findall(r"^\| (\d+)\b.*?\|.*?\| (`.*`|) *\| (\d+) GiB \|$", readme, re.MULTILINE)
    _, nodes, gpus_per_node = EXAMPLES[example]
    assert int(figures[0][0]) == nodes * gpus_per_node, "the first row of its table is the default"
    for gpus, flags, gib in figures:
        words = [*flags.strip("`").split(), "--load-hf", "null", "--json"]
        assert main(["plan", "RUN.yaml", "--world-size", gpus, *words]) == 0
        plan = json.loads(capsys.readouterr().out.rpartition("}")[0] + "}")
        needed = max(stage["needed"] for stage in plan["memory"])
        assert round(needed / 2**30) == int(gib), (gpus, flags)


@pytest.fixture
def launch(tmp_path, monkeypatch, capsys):
    """Write a job script for a small run; returns it, or the refusal."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, good_settings(tmp_path))
    (tmp_path / "tokenizer").rmdir()  # it is on the cluster

    def run(*flags, nodes=2):
        given = ["--run-dir", "runs/mine", "--nodes", str(nodes), "--gpus-per-node", "2", *flags]
        code = main(["launch", "slurm", "RUN.yaml", *given])
        said = capsys.readouterr()
        if code == 0:
            return said.out
        assert code == 2 and "Traceback" not in said.err, said.err
        return said.err

    return run


def directives(text):
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))


def test_the_job_script_asks_for_a_task_per_gpu_and_for_time_to_save(launch):
    asked = directives(launch("--output", "-", "--partition", "gpu", "--account", "me", "--time", "4:00:00"))
    assert asked == {
        "job-name": "mine",
        "nodes": "2",
        "ntasks-per-node": "2",
        "gpus-per-node": "2",
        "exclusive": "",
        "mem": "0",
        "partition": "gpu",
        "account": "me",
        "time": "4:00:00",
        "output": "%x-%j.log",
        "open-mode": "append",
        "requeue": "",
        "signal": "USR1@300",
    }
    less = directives(launch("--output", "-", "--save-seconds", "90"))
    assert less.keys() == asked.keys() - {"partition", "account", "time"}
    assert less["signal"] == "USR1@90"


def test_settings_that_are_given_are_checked_and_written_into_the_command(launch, tmp_path):
    script = launch("--output", "-", "--lr", "1e-3", "--train-iters", "30")
    assert '--resume auto \\\n  --lr 1e-3 --train-iters 30 \\\n  "$@" &\n' in script
    assert "--lr-x is an unknown flag" in launch("--output", "-", "--lr-x", "1")


def test_the_file_is_written_once_and_an_edited_one_is_kept(launch, tmp_path):
    assert "submit it from this folder: sbatch train.sbatch" in launch()
    assert "train.sbatch is written" in launch(), "the same again is no change"
    with (tmp_path / "train.sbatch").open("a") as script:
        script.write("# mine\n")
    assert "train.sbatch is there already and differs; remove it" in launch()
    assert (tmp_path / "train.sbatch").read_text().endswith("# mine\n")


@pytest.mark.parametrize(
    "flags, nodes, said",
    [
        ((), 0, "--nodes is 0; it must be 1 or more"),
        (("--save-seconds", "-1"), 2, "--save-seconds is -1"),
        (
            ("--partition", "gpu --nodes=99"),
            2,
            "--partition is 'gpu --nodes=99'; in a job script it may hold",
        ),
        (("--time", "5h"), 2, "--time is '5h', which Slurm does not read; give D-HH:MM:SS"),
        (("--run-dir", "runs/my run"), 2, "the name of --run-dir is 'my run'"),
        (("--run-dir", "a\nb/run"), 2, "would break a job script"),
        (("--expert-model-parallel-size", "8"), 2, "4 ranks cannot hold expert TP x EP x PP = 8"),
        (("--global-batch-size", "9"), 2, "global_batch_size 9 is not a multiple"),
        (("--bf16", "--gpu-memory-gb", "1"), 2, "on each GPU, more than --gpu-memory-gb 1"),
    ],
)
def test_what_could_not_run_gets_no_job_script(launch, tmp_path, flags, nodes, said):
    assert said in launch(*flags, nodes=nodes)
    assert not (tmp_path / "train.sbatch").exists()


def test_a_setting_of_another_host_is_no_hindrance(launch):
    """A login node has no GPU; the job's hosts have."""
    fused = ("--bf16", "--moe-grouped-gemm", "--moe-permute-fusion", "--recompute-modules", "[moe_act]")
    assert "--moe-permute-fusion" in launch("--output", "-", *fused, "--recompute-granularity", "selective")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck_finds_nothing(path):
    shellcheck = Path(sys.executable).parent / "shellcheck"
    checked = subprocess.run([shellcheck, "--external-sources", path], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_examples_scripts_are_among_those_checked():
    assert {ROOT / "examples" / name / "train.sbatch" for name in EXAMPLES} <= set(SCRIPTS)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_manifest_starts_the_examples_nodes_with_what_they_need(example):
    text = (ROOT / "examples" / example / "pytorchjob.yaml").read_text()
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"]), "a DNS label"
    assert "elasticPolicy" not in job["spec"]
    replicas = job["spec"]["pytorchReplicaSpecs"]
    _, nodes, gpus = EXAMPLES[example]
    counts = {role: settings["replicas"] for role, settings in replicas.items()}
    assert counts == ({"Master": 1, "Worker": nodes - 1} if nodes > 1 else {"Master": 1})
    for role in replicas.values():
        assert role["restartPolicy"] == "OnFailure"
        pod = role["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch", "the operator finds its container by that name"
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        assert environment["NNODES"] == str(nodes)
        assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
        assert environment["GPUS_PER_NODE"] == str(gpus)
        assert int(environment["SAVE_SECONDS"]) < pod["terminationGracePeriodSeconds"]
        used = set(re.findall(r"\$\{(\w+)\}", (ROOT / "examples" / example / "RUN.yaml").read_text()))
        assert used <= environment.keys()
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            volume["name"] for volume in pod["volumes"]
        }
        assert all(isinstance(value, str) for value in environment.values()), "as Kubernetes wants them"
        assert container["command"][-1].split()[-1] == f"examples/{example}/train.sh"


@pytest.fixture
def torchrun(tmp_path):
    """Run a launcher with a python3 that prints its arguments; returns them, or the complaint."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nprintf "%s\\n" "rank $RANK"\n')
    python.chmod(0o755)
    base = {"PATH": os.environ["PATH"], "PYTHON": str(python), "DATA": "/data"}
    base |= dict.fromkeys(("MIXTRAL", "QWEN3", "LLAMA_MOE", "MOLM"), "/model")

    def run(*arguments, script="mixtral_8x7b/train.sh", **environment):
        given = {**base, **environment}
        command = [ROOT / "examples" / script, *arguments]
        done = subprocess.run(command, env=given, capture_output=True, text=True)
        return done.stdout.splitlines() if done.returncode == 0 else done.stderr

    return run


@pytest.mark.parametrize("example", EXAMPLES)
def test_train_sh_is_the_only_node_unless_it_is_told_otherwise(torchrun, example):
    words = torchrun("--lr", "1e-5", script=f"{example}/train.sh", MASTER_ADDR="elsewhere")
    assert words[:2] == ["-m", "torch.distributed.run"]
    flags = ("--nnodes", "--node-rank", "--nproc-per-node", "--master-addr")
    assert [after(words, flag) for flag in flags] == ["1", "0", str(EXAMPLES[example][2]), "127.0.0.1"]
    command = words[words.index("--") + 1 :]
    run_yaml = str(ROOT / "examples" / example / "RUN.yaml")
    assert command[:5] == ["megatron_dynmix", "train", "--resume", "auto", run_yaml]
    assert command[5:9] == ["--run-dir", f"runs/{example}", "--lr", "1e-5"]


def test_train_sh_takes_its_place_among_nodes_from_the_environment(torchrun):
    place = {"NNODES": "8", "NODE_RANK": "3", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "2345"}
    words = torchrun(**place, GPUS_PER_NODE="4", RUN_DIR="/runs/one", SAVE_SECONDS="60", MAX_RESTARTS="2")
    flags = ("--nnodes", "--node-rank", "--master-addr", "--master-port")
    assert [after(words, flag) for flag in flags] == list(place.values())
    assert after(words, "--nproc-per-node") == "4" and after(words, "--run-dir") == "/runs/one"
    assert after(words, "--shutdown-timeout") == "60" and after(words, "--max-restarts") == "2"


@pytest.mark.parametrize(
    "environment, said",
    [
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK: which of 2 nodes this one is"),
        ({"NNODES": "2", "NODE_RANK": "1"}, "MASTER_ADDR: address of node 0"),
        ({"MIXTRAL": ""}, "MIXTRAL: set it to the folder of the Hugging Face model"),
        ({"DATA": ""}, "DATA: set it to the folder of the sources"),
    ],
)
def test_train_sh_says_what_is_missing(torchrun, environment, said):
    assert said in torchrun(**environment)


def test_the_manifest_names_the_node_by_the_operators_rank(torchrun, tmp_path):
    manifest = yaml.safe_load((ROOT / "examples/mixtral_8x7b/pytorchjob.yaml").read_text())
    (container,) = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    environment |= {"PATH": os.environ["PATH"], "PYTHON": str(tmp_path / "python")}
    # what the operator adds to a worker: its own number, counted from the master on
    environment |= {"RANK": "5", "MASTER_ADDR": "mixtral-8x7b-master-0", "MASTER_PORT": "23456"}
    done = subprocess.run(
        container["command"], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    words = done.stdout.splitlines()
    assert [after(words, flag) for flag in ("--node-rank", "--nnodes")] == ["5", "8"]
    assert after(words, "--master-addr") == "mixtral-8x7b-master-0"
    assert after(words, "--run-dir") == "/shared/runs/mixtral_8x7b"
