"""`doctor`: every check with every outcome, on machines that are made up; the command on this one."""

import contextlib
import dataclasses
import errno
import io
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from config_fixtures import good_settings, load, write
from packaging.utils import canonicalize_name

from megatron_dynmix import platform
from megatron_dynmix.cli import main
from megatron_dynmix.commands.doctor import findings_text
from megatron_dynmix.doctor import checks
from megatron_dynmix.doctor.facts import Facts, Folder, Gpu, _port_is_free, look, try_folder
from megatron_dynmix.doctor.ranks import Rank, fingerprint, folder_is_shared, others_findings, same_everywhere
from tests.distributed.ranks import run_ranks

platform.start()

GIB = 2**30
NEEDS = (
    "megatron-core<0.20,>=0.16.1",
    "numpy>=1.26",
    "psutil",
    'transformer-engine[pytorch]<2.12,>=2.9; extra == "te"',
)
VERSIONS = {"megatron-core": "0.16.1", "numpy": "2.4.6", "psutil": "7.0"}
LAPTOP = Facts(requirements=NEEDS, versions=VERSIONS, addresses={"laptop": "127.0.1.1"})
H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB)
NODE = dataclasses.replace(
    LAPTOP,
    versions={**VERSIONS, "transformer-engine": "2.10.0", "torch": "2.8.0+cu128"},
    apex="NVIDIA",
    torch_cuda="12.8",
    cuda_available=True,
    driver="570.86",
    driver_cuda="12.8",
    gpus=(H100,) * 8,
    nccl="2.27.3",
    infiniband=("mlx5_0", "mlx5_1"),
)
RANK = {"RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
ADDRESSES = {"laptop": "10.0.0.2", "node0": "10.0.0.1"}


def versions(machine, **changed):
    names = {canonicalize_name(name): version for name, version in changed.items()}
    kept = {**machine.versions, **names}
    return {"versions": {name: version for name, version in kept.items() if version is not None}}


def told(**environment):
    return {"environment": {**RANK, **environment}, "addresses": ADDRESSES}


CASES = [
    (checks.python, NODE, {}, "OK", "3.11.0"),
    (checks.python, NODE, {"python": "3.14.1"}, "problem", "3.10 to 3.13"),
    (checks.python, NODE, {"python": "3.9.2"}, "problem", "3.9.2"),
    (checks.packages, LAPTOP, {}, "OK", "megatron-core 0.16.1"),
    (
        checks.packages,
        LAPTOP,
        versions(LAPTOP, megatron_core="0.20.0"),
        "problem",
        "megatron-core 0.20.0",
    ),
    (checks.packages, LAPTOP, versions(LAPTOP, megatron_core="0.19.2"), "OK", "megatron-core 0.19.2"),
    (checks.packages, LAPTOP, versions(LAPTOP, psutil=None), "problem", "psutil is missing"),
    (checks.packages, LAPTOP, {"requirements": ()}, "problem", "not installed"),
    (checks.transformer_engine, LAPTOP, {}, "OK", "not needed on a CPU"),
    (checks.transformer_engine, NODE, {}, "OK", "2.10.0"),
    (checks.transformer_engine, NODE, versions(NODE, transformer_engine=None), "warning", "not installed"),
    (checks.transformer_engine, NODE, versions(NODE, transformer_engine="2.12.0"), "problem", "2.12.0"),
    (
        *(checks.transformer_engine, NODE),
        *({"import_errors": {"transformer_engine": "ImportError: undefined symbol"}}, "problem", "undefined"),
    ),
    (checks.apex, NODE, {}, "OK", "NVIDIA's"),
    (checks.apex, LAPTOP, {}, "OK", "not needed"),
    (checks.apex, NODE, {"apex": "namesake"}, "problem", "pip uninstall apex"),
    (checks.flash_attention, NODE, {}, "OK", "not needed"),
    (checks.flash_attention, NODE, versions(NODE, flash_attn="2.8.1"), "OK", "not used"),
    (
        *(checks.flash_attention, NODE),
        *({**versions(NODE, flash_attn="2.8.1"), "flash_attention_range": ("2.1.1", "2.8.1")}, "OK", "2.8.1"),
    ),
    (
        *(checks.flash_attention, NODE),
        *({**versions(NODE, flash_attn="2.8.3"), "flash_attention_range": ("2.1.1", "2.8.1")}, "warning"),
        "2.8.3; this Transformer Engine takes 2.1.1 to 2.8.1",
    ),
    (
        *(checks.flash_attention, NODE),
        {**versions(NODE, flash_attn="2.8.1"), "import_errors": {"flash_attn": "ImportError: GLIBC"}},
        *("problem", "GLIBC"),
    ),
    (checks.cuda, LAPTOP, {}, "OK", "runs on the CPU"),
    (checks.cuda, NODE, {}, "OK", "torch's 12.8, the driver's 12.8"),
    (checks.cuda, LAPTOP, {"driver": "570.86"}, "problem", "built for CPUs"),
    (checks.cuda, LAPTOP, {"torch_cuda": "12.8"}, "OK", "no driver"),
    (
        checks.cuda,
        NODE,
        {"cuda_available": False, "torch_cuda": "13.0"},
        "problem",
        "a torch that is built for CUDA 12",
    ),
    (checks.cuda, NODE, {"cuda_available": False, "cuda_error": "No CUDA GPUs"}, "problem", "No CUDA GPUs"),
    (checks.gpus, LAPTOP, {}, "OK", "none"),
    (checks.gpus, NODE, {}, "OK", "8 x NVIDIA H100 80GB HBM3, 80 GiB"),
    (checks.gpus, NODE, {"gpus": (H100, Gpu("NVIDIA A100", 40 * GIB, 40 * GIB))}, "warning", "slowest"),
    (
        checks.gpus,
        NODE,
        {"gpus": (H100, Gpu(H100.name, 80 * GIB, 8 * GIB))},
        "warning",
        "use number 1: 8 GiB",
    ),
    (checks.backends, LAPTOP, {}, "OK", "gloo"),
    (checks.backends, NODE, {}, "OK", "NCCL 2.27.3"),
    (checks.backends, NODE, {"nccl": None}, "problem", "no NCCL"),
    (checks.backends, LAPTOP, {"gloo": False}, "problem", "no gloo"),
    (checks.infiniband, LAPTOP, {}, "OK", "Ethernet"),
    (checks.infiniband, NODE, {}, "OK", "mlx5_0, mlx5_1"),
    (checks.infiniband, NODE, {"environment": {"NCCL_IB_DISABLE": "1"}}, "warning", "NCCL_IB_DISABLE"),
    (checks.infiniband, NODE, {"locked_memory": 65536}, "warning", "64 KiB of memory may be locked"),
    (checks.ranks, LAPTOP, {}, "OK", "not in a job"),
    (checks.ranks, NODE, told(), "OK", "rank 1 of 16"),
    (
        checks.ranks,
        NODE,
        {"environment": {"RANK": "0"}},
        "problem",
        "not WORLD_SIZE, MASTER_ADDR, MASTER_PORT",
    ),
    (checks.ranks, NODE, told(RANK="16"), "problem", "RANK is 16, but WORLD_SIZE is 16"),
    (checks.ranks, NODE, told(RANK="one"), "problem", "RANK is 'one'"),
    (checks.ranks, NODE, told(LOCAL_RANK="8", LOCAL_WORLD_SIZE="8"), "problem", "LOCAL_RANK is 8"),
    (checks.ranks, NODE, told(SLURM_PROCID="2", SLURM_NTASKS="16"), "problem", "SLURM_PROCID is 2"),
    (checks.ranks, NODE, told(SLURM_PROCID="1", SLURM_NTASKS="8"), "problem", "SLURM_NTASKS is 8"),
    (checks.ranks, NODE, told(SLURM_PROCID="0", SLURM_NTASKS="2", TORCHELASTIC_RUN_ID="7"), "OK", "rank 1"),
    (
        checks.ranks,
        NODE,
        told(LOCAL_RANK="1", LOCAL_WORLD_SIZE="16"),
        "problem",
        "16 ranks on this node, but 8",
    ),
    (checks.meeting_place, LAPTOP, {}, "OK", "known by name"),
    (checks.meeting_place, NODE, told(), "OK", "node0:29500"),
    (
        checks.meeting_place,
        NODE,
        {**told(), "addresses": {"laptop": "10.0.0.2", "node0": None}},
        "problem",
        "node0",
    ),
    (checks.meeting_place, NODE, told(MASTER_PORT="99999"), "problem", "from 1 to 65535"),
    (checks.meeting_place, NODE, {**told(), "port_is_free": False}, "problem", "29500 is in use"),
    (checks.meeting_place, LAPTOP, {"addresses": {"laptop": None}}, "warning", "/etc/hosts"),
    (checks.interfaces, LAPTOP, {}, "OK", "eth0"),
    (checks.interfaces, LAPTOP, {"environment": {"NCCL_SOCKET_IFNAME": "eth"}}, "OK", "eth0"),
    (checks.interfaces, LAPTOP, {"environment": {"NCCL_SOCKET_IFNAME": "^docker"}}, "OK", "eth0"),
    (checks.interfaces, LAPTOP, {"environment": {"NCCL_SOCKET_IFNAME": "ib0"}}, "problem", "there is no ib0"),
    (checks.interfaces, LAPTOP, {"environment": {"GLOO_SOCKET_IFNAME": "eth"}}, "problem", "there is no eth"),
    (checks.time_outs, LAPTOP, {}, "OK", "distributed_timeout_minutes"),
    (
        *(checks.time_outs, NODE, {"environment": {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}}, "problem"),
        "hangs until it is cancelled",
    ),
    (
        checks.time_outs,
        NODE,
        {"environment": {"NCCL_BLOCKING_WAIT": "1"}},
        "warning",
        "TORCH_NCCL_BLOCKING_WAIT",
    ),
    (checks.time_outs, NODE, {"environment": {"CUDA_LAUNCH_BLOCKING": "1"}}, "warning", "every kernel"),
    (checks.open_files, LAPTOP, {}, "OK", "65536"),
    (checks.open_files, LAPTOP, {"open_files": 1024}, "warning", "ulimit -n"),
    (checks.shared_memory, LAPTOP, {}, "OK", "8.0 GiB"),
    (checks.shared_memory, LAPTOP, {"shared_memory": 64 * 2**20}, "warning", "--shm-size"),
    (checks.address_space, LAPTOP, {}, "OK", "16 GiB"),
    (checks.address_space, LAPTOP, {"address_space": 8 * GIB}, "warning", "limit of 8 GiB"),
]


@pytest.mark.parametrize(
    ("check", "machine", "changes", "status", "says"),
    CASES,
    ids=[f"{case[0].__name__}-{case[3]}-{number}" for number, case in enumerate(CASES)],
)
def test_a_check_of_a_machine(check, machine, changes, status, says):
    finding = check(dataclasses.replace(machine, **changes))
    assert finding.status == status
    assert says in f"{finding.found} {finding.remedy}"
    assert bool(finding.remedy) == (status != "OK")


FOLDER = Folder(path="/shared")
TWO_NODES = {"SLURM_JOB_NUM_NODES": "2"}


@pytest.mark.parametrize(
    ("folder", "environment", "checkpoint", "bad", "says"),
    [
        ({}, {}, None, {}, "of this node only"),
        ({}, {}, 10 * GIB, {}, "a checkpoint of this run is 10.0 GiB"),
        ({"kind": "nfs4"}, TWO_NODES, None, {}, "some seconds late"),
        ({"kind": "lustre"}, TWO_NODES, None, {}, "stripe"),
        (
            {"kind": "xfs"},
            TWO_NODES,
            None,
            {"file system": "problem"},
            "which this node alone sees; the job has 2",
        ),
        (
            *({"kind": "tmpfs"}, {"WORLD_SIZE": "32", "LOCAL_WORLD_SIZE": "8"}, None),
            *({"file system": "problem"}, "the job has 4"),
        ),
        ({"error": "Permission denied"}, {}, None, {"writing": "problem"}, "Permission denied"),
        ({"seconds": 9.0}, {}, None, {"writing": "warning"}, "overloaded"),
        ({"free": 15 * GIB}, {}, 10 * GIB, {"space": "problem"}, "make room for two"),
        ({"skew": -40.0}, {}, None, {"clock": "warning"}, "-40.0 s off"),
    ],
)
def test_a_check_of_a_folder(folder, environment, checkpoint, bad, says):
    tried = dataclasses.replace(FOLDER, **folder)
    facts = dataclasses.replace(LAPTOP, folder=tried, environment=environment, checkpoint_bytes=checkpoint)
    names = ("writing", "file system", "space", "clock")
    findings = [finding for finding in checks.findings_of(facts) if finding.name in names]
    assert [finding.name for finding in findings] == list(names)
    assert {finding.name: finding.status for finding in findings if finding.status != "OK"} == bad
    assert says in " ".join(f"{finding.found} {finding.remedy}" for finding in findings)


def test_a_folder_is_tried_and_left_as_it_was(tmp_path, monkeypatch):
    mounts = [("/", "ext4"), (str(tmp_path), "xfs"), (str(tmp_path), "nfs4"), ("/elsewhere", "tmpfs")]
    found = [SimpleNamespace(mountpoint=point, fstype=kind) for point, kind in mounts]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: found)
    folder = try_folder(tmp_path / "not" / "there")
    assert (folder.error, folder.kind) == ("", "nfs4")
    assert abs(folder.skew) < 60 and folder.free > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_flushed_is_a_problem(tmp_path, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in try_folder(tmp_path).error
    assert list(tmp_path.iterdir()) == []


def rank_of(host, machine=NODE, **said):
    return Rank(**{"host": host, "fingerprint": fingerprint(machine), "findings": (), **said})


def test_ranks_must_be_alike():
    other = dataclasses.replace(NODE, **versions(NODE, numpy="1.26.0"))
    ranks = [rank_of("node0"), rank_of("node0"), rank_of("node1", other)]
    assert same_everywhere(ranks[:2]).found == "2 on 1 machine, all alike"
    finding = same_everywhere(ranks)
    assert finding.status == "problem" and "node1 are not those of node0" in finding.found


def test_what_is_wrong_on_another_machine_is_told_once():
    findings = checks.findings_of(dataclasses.replace(NODE, apex="namesake"))
    (bad,) = (finding for finding in findings if finding.status == "problem")
    ranks = [rank_of(host, findings=(bad,)) for host in ("node0", "node0", "node1", "node1")]
    (finding,) = others_findings(ranks)
    assert finding.name == "apex" and finding.found.endswith("(on node1)") and finding.remedy == bad.remedy


def test_a_folder_must_be_seen_by_all(tmp_path):
    seen = [rank_of("node0", sees_folder=True), rank_of("node1", sees_folder=True)]
    blind = [*seen, rank_of("node2", sees_folder=False)]
    assert [finding.status for finding in folder_is_shared(seen, tmp_path)] == ["OK"]
    (finding,) = folder_is_shared(blind, tmp_path)
    assert finding.status == "problem" and "node2 did not see in 10 s what node0 wrote" in finding.found
    assert folder_is_shared([rank_of("node0")], None) == []


def test_only_the_first_rank_tries_the_port():
    """The others may find it taken, by the first."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        given = {**RANK, "MASTER_ADDR": "localhost", "MASTER_PORT": str(taken.getsockname()[1])}
        found = [_port_is_free({**given, "RANK": rank}, {"localhost": "127.0.0.1"}) for rank in "01"]
    assert found == [False, None]


def doctor_of_a_rank(shared_dir):
    """Exit code and text of the command on this rank."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = main(["doctor", "--shared-dir", str(shared_dir)])
    return code, said.getvalue()


def test_ranks_meet_and_the_first_one_prints(tmp_path):
    (code, text), other = run_ranks(2, doctor_of_a_rank, tmp_path)
    assert "all ranks" in text and "2 on 1 machine, all alike" in text
    assert f"all ranks see what the first one writes in {tmp_path}" in text
    assert other == (code, "") and list(tmp_path.iterdir()) == []


def test_a_run_is_held_against_the_machine(tmp_path):
    settings = good_settings(tmp_path)
    facts = dataclasses.replace(LAPTOP, config=load(tmp_path, settings))
    assert checks.run_settings(facts).status == "OK" and checks.run_time_out(facts) is None
    settings["model"]["moe_grouped_gemm"] = True
    settings["parallel"]["distributed_timeout_minutes"] = 1
    facts = dataclasses.replace(LAPTOP, config=load(tmp_path, settings))
    found = checks.run_settings(facts)
    assert found.status == "problem" and "moe_grouped_gemm" in found.found
    broken = {"import_errors": {"transformer_engine": "ImportError: undefined symbol"}}
    for machine, status in ((NODE, "OK"), (dataclasses.replace(NODE, **broken), "problem")):
        settings["training"]["bf16"] = True
        machine = dataclasses.replace(machine, config=load(tmp_path, settings))
        assert checks.run_settings(machine).status == status
    found = checks.run_time_out(facts)
    assert found.status == "warning" and "distributed_timeout_minutes is 1" in found.found


def test_tensor_parallel_gpus_need_one_connection(tmp_path):
    settings = good_settings(tmp_path)
    settings["parallel"]["tensor_model_parallel_size"] = 2
    config = load(tmp_path, settings)
    assert checks.connections(dataclasses.replace(LAPTOP, config=config)) is None
    assert checks.connections(dataclasses.replace(NODE, config=config)).status == "warning"
    one = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert checks.connections(dataclasses.replace(NODE, config=config, environment=one)) is None


def test_a_model_that_cannot_be_sized_is_a_problem_of_the_run(tmp_path):
    config = load(tmp_path, good_settings(tmp_path))
    finding = checks.run_settings(dataclasses.replace(LAPTOP, config=config, model_error="no such head"))
    assert (finding.status, finding.found) == ("problem", "no such head")


def test_the_text_has_every_remedy():
    findings = checks.findings_of(dataclasses.replace(NODE, apex="namesake"))
    text = findings_text(findings)
    assert "PROBLEM  apex" in text and "-> pip uninstall apex" in text
    assert text.endswith(f"{len(findings)} checks: 1 problems, 0 warnings")


def test_the_table_is_that_of_the_docs():
    page = (Path(__file__).parents[2] / "docs/doctor.md").read_text()
    for name, _ in checks.CHECKS:
        assert name in page, name
    assert set(checks.FOR_MEETING) <= {name for name, _ in checks.CHECKS}


def test_this_machine_is_looked_at(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("RANK", raising=False)
    machine = look()
    assert machine.versions["megatron-core"].startswith(("0.16.", "0.17.", "0.18.", "0.19."))
    assert any(need.startswith("megatron-core") for need in machine.requirements)
    path = write(tmp_path, good_settings(tmp_path))
    code = main(["doctor", str(path), "--shared-dir", str(tmp_path)])
    text = capsys.readouterr().out
    assert code == int("PROBLEM" in text)
    assert "RUN.yaml" in text and "writing" in text


def test_a_folder_that_is_not_there_is_a_problem(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("RANK", raising=False)
    assert main(["doctor", "--shared-dir", str(tmp_path / "nowhere")]) == 1
    assert "nowhere is no folder" in capsys.readouterr().out


def test_flags_need_a_run(capsys):
    assert main(["doctor", "--bf16"]) == 2
    assert "only beside a RUN.yaml" in capsys.readouterr().err


def test_tasks_of_srun_are_ranks(monkeypatch, capsys):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert main(["doctor"]) == 2
    assert "one of 2 tasks of srun, but MASTER_ADDR and MASTER_PORT are not set" in capsys.readouterr().err
