"""Checks that the ranks of a job make together: whether all are well, alike, and share the folder."""

from __future__ import annotations

import dataclasses
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from megatron_dynmix import platform
from megatron_dynmix.doctor.checks import Finding, good, problem
from megatron_dynmix.doctor.facts import Facts, nearest_folder
from megatron_dynmix.files import sha256

MEETING_SECONDS = 60
SEEING_SECONDS = 10.0
"""Within which others see a file that one node wrote; NFS keeps what it read of a folder for some of them."""
ALL, FOLDER = "all ranks", "shared folder"


@dataclass(frozen=True, kw_only=True)
class Rank:
    """What a rank tells the others."""

    host: str
    fingerprint: str
    findings: tuple[Finding, ...]
    """What is not well there."""
    sees_folder: bool | None = None
    """Whether a file that rank 0 wrote is there; None if no folder is tried, or rank 0 cannot write."""


def fingerprint(facts: Facts) -> str:
    """Return a digest of what must be the same on all ranks: Python, packages, driver, kinds of GPU."""
    versions = sorted(facts.versions.items())
    kinds = sorted({gpu.name for gpu in facts.gpus})
    return sha256(repr((facts.python, versions, facts.torch_cuda, facts.driver, kinds)))


def check_ranks(facts: Facts, findings: Sequence[Finding]) -> list[Finding]:
    """Join over gloo, as `train` would before anything else, and hear what the others found."""
    minutes = MEETING_SECONDS / 60
    try:
        torch.distributed.init_process_group(
            "gloo",
            store=platform.rendezvous(minutes),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timedelta(minutes=minutes),
        )
        ranks = _told(facts, findings)
        torch.distributed.destroy_process_group()
    except (RuntimeError, ValueError) as error:
        found = f"they did not meet in {MEETING_SECONDS} s: {str(error).splitlines()[0]}"
        return [problem(found, "look at MASTER_ADDR, and for a rank that never started", ALL)]
    return [*others_findings(ranks), same_everywhere(ranks), *folder_is_shared(ranks, facts.shared_dir)]


def _told(facts: Facts, findings: Sequence[Finding]) -> list[Rank]:
    """Return what every rank has to say, in their order; the folder is tried by a file of rank 0."""
    is_first = torch.distributed.get_rank() == 0
    written = [_write_mark(facts.shared_dir) if is_first and facts.shared_dir is not None else None]
    torch.distributed.broadcast_object_list(written, src=0)
    mark = written[0]
    rank = Rank(
        host=facts.hostname,
        fingerprint=fingerprint(facts),
        findings=tuple(finding for finding in findings if finding.status != "OK"),
        sees_folder=None if mark is None else _appears(mark),
    )
    ranks = [rank] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, rank)
    if is_first and mark is not None:
        mark.unlink(missing_ok=True)
    return ranks


def _write_mark(folder: Path) -> Path | None:
    mark = nearest_folder(folder) / f".doctor-{uuid.uuid4().hex}"
    try:
        mark.write_bytes(b"")
    except OSError:
        return None  # which `writing` has said already
    return mark


def _appears(path: Path) -> bool:
    """Return whether a file is there, or comes to be."""
    deadline = time.monotonic() + SEEING_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def others_findings(ranks: Sequence[Rank]) -> list[Finding]:
    """Return what is not well on other machines than the first rank's, once for each of them."""
    found = {
        (rank.host, finding.name): finding
        for rank in ranks
        if rank.host != ranks[0].host
        for finding in rank.findings
    }
    return [
        dataclasses.replace(finding, found=f"{finding.found} (on {host})")
        for (host, _), finding in found.items()
    ]


def same_everywhere(ranks: Sequence[Rank]) -> Finding:
    """Check that all ranks have what the first one has."""
    other = sorted({rank.host for rank in ranks if rank.fingerprint != ranks[0].fingerprint})
    if other:
        found = f"Python, packages, driver or GPUs of {', '.join(other)} are not those of {ranks[0].host}"
        return problem(found, "use one environment or container on all nodes; run doctor on each", ALL)
    hosts = len({rank.host for rank in ranks})
    return good(f"{len(ranks)} on {hosts} machine{'s' * (hosts > 1)}, all alike", name=ALL)


def folder_is_shared(ranks: Sequence[Rank], folder: Path | None) -> list[Finding]:
    """Check that every rank sees what the first one writes; nothing if that was not tried."""
    if ranks[0].sees_folder is None:
        return []
    if blind := sorted({rank.host for rank in ranks if not rank.sees_folder}):
        writer = f"what {ranks[0].host} wrote in {folder}"
        found = f"{', '.join(blind)} did not see in {SEEING_SECONDS:.0f} s {writer}"
        return [problem(found, "mount the same file system under the same name on all nodes", FOLDER)]
    return [good(f"all ranks see what the first one writes in {folder}", name=FOLDER)]
