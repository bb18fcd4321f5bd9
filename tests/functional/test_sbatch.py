"""The examples' launchers with their own settings but a tiny model, two ranks on CPU, and no cluster.

Stand-ins for `srun` and `scontrol` are on PATH. They do what Slurm's do as far as the job script can tell.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dynmix.commands import quickstart
from megatron_dynmix.records.jsonl import read_records
from tests.ports import FIRST, free_port

ROOT = Path(__file__).parents[2]
SBATCH = "examples/mixtral_8x7b/train.sbatch"
TINY = [
    *("--preset", "tiny", "--load-hf", "null", "--save-hf", "null", "--hidden-size", "32"),
    *("--ffn-hidden-size", "48", "--no-moe-grouped-gemm", "--no-moe-permute-fusion", "--no-bf16"),
    *("--expert-model-parallel-size", "2", "--pipeline-model-parallel-size", "1"),
    *("--virtual-pipeline-model-parallel-size", "null", "--distributed-timeout-minutes", "1"),
    *("--seq-length", "128", "--global-batch-size", "2", "--num-workers", "0", "--probe-tokens", "256"),
    *("--interval", "2", "--log-interval", "1", "--lr-warmup-iters", "0", "--lr-decay-iters", "9"),
]
SRUN = """#!{python}
# Two tasks of this machine. SIGUSR1 is passed on, but SIGTERM ends the step by force, as Slurm's does. The
# exit code is the highest of the tasks'.
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
open(os.environ["SAID"], "a").write("srun " + " ".join(sys.argv[1:]) + "\\n")
tasks = []
signal.signal(signal.SIGUSR1, lambda number, _: [task.send_signal(number) for task in tasks])
signal.signal(signal.SIGTERM, lambda *_: [task.kill() for task in tasks])
for rank in range(2):
    place = {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2"}}
    tasks.append(subprocess.Popen(words, env={{**os.environ, **place}}))
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
SCONTROL = """#!/bin/sh
echo "scontrol $*" >>"$SAID"
if [ "$1" = show ]; then printf 'localhost\\nother-node\\n'; else exit "${REQUEUE_CODE:-0}"; fi
"""


class Cluster:
    """One machine that takes itself for two nodes' Slurm."""

    def __init__(self, folder):
        self.folder, self.said = folder, folder / "said"
        (folder / "bin").mkdir()
        for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        (folder / "examples").symlink_to(ROOT / "examples")
        self.processes = []

    def start(self, command, log, **environment):
        """Run a launcher as its only user would; what it says is added to the file."""
        given = {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            "SAID": str(self.said),
            "SLURM_JOB_ID": str(free_port() - FIRST),
            "SLURM_JOB_NODELIST": "node[1-2]",
            **environment,
        }
        with log.open("a") as file:
            process = subprocess.Popen(
                command, cwd=self.folder, env=given, stdout=file, stderr=file, start_new_session=True
            )
        self.processes.append(process)
        return process

    def calls(self):
        return self.said.read_text().splitlines() if self.said.exists() else []


@pytest.fixture
def cluster(tmp_path):
    one = Cluster(tmp_path)
    yield one
    for process in one.processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Tokenizer and small sources where the example's variables say."""
    monkeypatch.setattr(quickstart, "TRAIN_EXAMPLES", 120)
    monkeypatch.setattr(quickstart, "PROBE_EXAMPLES", 12)
    folder = tmp_path / "quickstart"
    quickstart.make_quickstart(folder)
    names = {"chat": "chat", "general": "math_again", "math": "math", "code": "code"}
    for name, ours in names.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "train.jsonl").symlink_to(folder / f"{ours}.jsonl")
        (tmp_path / "data" / name / "dev.jsonl").symlink_to(folder / f"{ours}.probe.jsonl")
    return {"MIXTRAL": str(folder / "tokenizer"), "DATA": str(tmp_path / "data")}


def wait_for(text, process, log, seconds=150):
    deadline = time.monotonic() + seconds
    while text not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def iterations(run_dir):
    return [record["iteration"] for record in read_records(run_dir / "metrics.jsonl")]


@pytest.mark.slow
def test_a_preempted_job_saves_is_queued_again_and_goes_on(cluster, places, tmp_path):
    log, run_dir = tmp_path / "log", tmp_path / "runs/mixtral_8x7b"
    command = ["bash", SBATCH, *TINY, "--train-iters"]
    job = cluster.start([*command, "400"], log, **places)
    wait_for(" iteration        2/", job, log)
    # the one process that some sites tell; its step would not survive a SIGTERM that is passed on as it is
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait(120) == 75, log.read_text()
    said = cluster.calls()
    assert said[0] == "scontrol show hostnames node[1-2]"
    assert said[1].startswith("srun --kill-on-bad-exit=0 --wait=600 --cpu-bind=none ")
    (requeue,) = said[2:]
    assert requeue.startswith("scontrol requeue "), "with its own number"
    done = iterations(run_dir)
    saved = int((run_dir / "checkpoints/latest_checkpointed_iteration.txt").read_text())
    assert done == list(range(1, saved + 1)) and 2 <= saved < 400

    again = cluster.start([*command, str(saved + 2)], log, **places)
    assert again.wait(150) == 0, log.read_text()
    assert iterations(run_dir) == list(range(1, saved + 3))
    assert [line.split()[0] for line in cluster.calls()[3:]] == ["scontrol", "srun"], "it is not queued again"


@pytest.mark.slow
def test_train_sh_starts_two_ranks_and_goes_on_with_them(cluster, places, tmp_path):
    log, run_dir = tmp_path / "log", tmp_path / "mine"
    place = {**places, "RUN_DIR": str(run_dir), "GPUS_PER_NODE": "2", "MASTER_PORT": str(free_port())}
    command = [str(ROOT / "examples/mixtral_8x7b/train.sh"), *TINY, "--train-iters"]
    for until in (2, 4):
        assert cluster.start([*command, str(until)], log, **place).wait(150) == 0, log.read_text()
        assert iterations(run_dir) == list(range(1, until + 1))


@pytest.mark.parametrize("code", [0, 1, 2, 75, 137])
def test_only_a_job_that_saved_is_queued_again_and_its_exit_code_is_the_tasks(cluster, tmp_path, code):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{'kill -9 $$' if code == 137 else f'exit {code}'}\n")
    python.chmod(0o755)
    job = cluster.start(["bash", SBATCH], tmp_path / "log", PYTHON=str(python), REQUEUE_CODE="1")
    assert job.wait(30) == code
    requeued = [line for line in cluster.calls() if line.startswith("scontrol requeue")]
    assert len(requeued) == (code == 75)
    complaint = "was not queued again by this script"
    assert (complaint in (tmp_path / "log").read_text()) == (code == 75), "Slurm would not, and it says so"


def test_the_ranks_are_asked_once_for_each_signal_and_the_job_waits_for_their_answer(cluster, tmp_path):
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/bash\ntrap "echo $SLURM_PROCID at $MASTER_ADDR; asked=yes" USR1\n'
        'echo ready; until [ "$asked" ]; do sleep 0.1; done; sleep 1; exit 75\n'
    )
    python.chmod(0o755)
    log = tmp_path / "log"
    job = cluster.start(["bash", SBATCH], log, PYTHON=str(python), MASTER_ADDR="left-over")
    wait_for("ready\nready\n", job, log, 30)
    os.kill(job.pid, signal.SIGUSR1)
    wait_for("1 at localhost", job, log, 30)
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait(30) == 75, log.read_text()
    assert "0 at localhost" in log.read_text()


def test_a_job_that_is_submitted_from_elsewhere_says_so(cluster, tmp_path):
    (tmp_path / "examples").unlink()
    log = tmp_path / "log"
    job = cluster.start(["bash", str(ROOT / SBATCH)], log)
    assert job.wait(30) == 2 and not cluster.calls()
    assert "there is no examples/mixtral_8x7b/RUN.yaml in" in log.read_text()
