"""Checks of what is installed."""

from __future__ import annotations

from packaging.requirements import Requirement
from packaging.version import Version

from megatron_dynmix.doctor.finding import Finding, good, problem, warning
from megatron_dynmix.doctor.machine import Machine, normalised

PYTHONS = ((3, 10), (3, 13))
"""Least and greatest that megatron-core 0.16.1 has wheels for."""
SHOWN = ("megatron-core", "torch", "numpy", "transformers", "tokenizers")
TE = "transformer-engine"
INSTALL_TE = (
    'pip install --no-build-isolation "transformer_engine[pytorch]>=2.9,<2.12", torch first, or use the '
)
INSTALL_TE += "NGC PyTorch image"
FLASH = "flash-attn"


def check_packages(machine: Machine) -> list[Finding]:
    """Every check of this file, in the order of the table."""
    return [
        python(machine),
        requirements(machine),
        transformer_engine(machine),
        apex(machine),
        flash_attention(machine),
    ]


def python(machine: Machine) -> Finding:
    """The versions that megatron-core 0.16.1 has wheels for."""
    version = Version(machine.python).release[:2]
    least, greatest = PYTHONS
    if least <= version <= greatest:
        return good("Python", machine.python)
    said = f"{'.'.join(map(str, least))} to {'.'.join(map(str, greatest))}"
    return problem(
        "Python", machine.python, f"megatron-core 0.16.1 has wheels for {said}: make a venv with one"
    )


def requirements(machine: Machine) -> Finding:
    """Everything that this package itself asks for, in the versions that it asks for."""
    name = "packages"
    if not machine.requirements:
        return problem(name, "megatron-dynmix is not installed, only found", "pip install -e . in its folder")
    wanted = [Requirement(line) for line in machine.requirements]
    bad = [
        f"{need.name} {machine.versions.get(normalised(need.name), 'is missing')} (needs {need.specifier})"
        for need in wanted
        if (need.marker is None or need.marker.evaluate({"extra": ""}))
        and not _met(need, machine.versions.get(normalised(need.name)))
    ]
    if bad:
        return problem(
            name, "; ".join(bad), "pip install -c constraints.txt -e . gives the versions of the tests"
        )
    shown = ", ".join(f"{each} {machine.versions[each]}" for each in SHOWN if each in machine.versions)
    return good(name, shown)


def _met(need: Requirement, version: str | None) -> bool:
    return version is not None and need.specifier.contains(version, prereleases=True)


def transformer_engine(machine: Machine) -> Finding:
    """Needed on GPUs to be fast, in the versions that megatron-core 0.16.1 was made for."""
    name = "Transformer Engine"
    version = machine.versions.get(TE)
    if not machine.cuda_available:
        return good(name, "not needed on a CPU" + (f" ({version} is installed)" if version else ""))
    if version is None:
        return warning(name, "not installed: plain torch layers, no grouped GEMM, no fusions", INSTALL_TE)
    if error := machine.import_errors.get("transformer_engine"):
        return problem(
            name,
            f"{version} fails to import: {error}",
            "it was compiled for another torch or CUDA: remove it, and build it again against this torch",
        )
    wanted = [Requirement(line) for line in machine.requirements if normalised(line).startswith(TE)]
    if wanted and not _met(wanted[0], version):
        return problem(name, f"{version} (megatron-core 0.16.1 needs {wanted[0].specifier})", INSTALL_TE)
    return good(name, version)


def apex(machine: Machine) -> Finding:
    """NVIDIA's, or the package of the same name on the Python package index."""
    if machine.apex == "namesake":
        return problem(
            "apex",
            "a package of the same name, not NVIDIA's: megatron-core takes it for NVIDIA's and fails",
            "pip uninstall apex; it is not needed (NVIDIA's is built from github.com/NVIDIA/apex)",
        )
    return good("apex", "NVIDIA's" if machine.apex == "NVIDIA" else "not installed, not needed")


def flash_attention(machine: Machine) -> Finding:
    """Only Transformer Engine uses it; it refuses versions that it does not know."""
    version = machine.versions.get(FLASH)
    if version is None:
        return good(FLASH, "not installed, not needed: Transformer Engine has attention of its own")
    if error := machine.import_errors.get("flash_attn"):
        return problem(
            FLASH, f"{version} fails to import: {error}", f"pip uninstall {FLASH}; it is not needed"
        )
    if machine.flash_attention_range is None:
        return good(FLASH, f"{version}, not used: only Transformer Engine would")
    least, greatest = machine.flash_attention_range
    if not Version(least) <= Version(version) <= Version(greatest):
        return warning(
            FLASH,
            f"{version}; this Transformer Engine takes {least} to {greatest} and will not use it",
            f"pip install --no-build-isolation {FLASH}=={greatest}, or uninstall it",
        )
    return good(FLASH, version)
