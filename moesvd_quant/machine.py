"""What a machine can do for a run, and what is missing. Asks nothing of the network."""

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.resources import files

from packaging.requirements import Requirement

PACKAGES = ("torch", "transformers", "numba", "safetensors", "peft", "gptqmodel", "bitsandbytes", "datasets", "lm-eval")
EXTRAS = {"ray": "ray", "serve": "fastapi"}  # extra: a package that it brings
VECTORS = ("avx2", "avx512f", "avx512bf16", "amx-bf16", "neon")  # of use to products of matrices, by LLVM's names
GB = 1e9


class State(StrEnum):
    OK = "ok"
    NOTE = "note"  # works; something could be better
    MISSING = "missing"  # a run would fail


@dataclass(frozen=True)
class Finding:
    name: str
    state: State
    value: str
    advice: str = ""


def examine() -> list[Finding]:
    """All findings, from the machine to the packages."""
    return [cores(), instructions(), memory(), gpu(), cache(), hub(os.environ), *packages(), *extras()]


def cores() -> Finding:
    """Cores that this process may use, and threads of a task."""
    free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = int(os.environ.get("MOESVD_THREADS", "2"))
    value = f"{free} cores, {threads} threads for each task (MOESVD_THREADS)"
    if threads > free:
        return Finding(
            "cores", State.NOTE, value, f"MOESVD_THREADS={free}: more threads than cores wait for each other"
        )
    workers = free // threads
    advice = f"--workers {workers} uses all of them, where memory suffices" if workers > 1 else ""
    return Finding("cores", State.OK, value, advice)


def instructions() -> Finding:
    """Vector instructions of the processor."""
    from llvmlite.binding import get_host_cpu_features

    features = get_host_cpu_features()
    found = [name for name in VECTORS if features.get(name)]
    if found:
        return Finding("instructions", State.OK, ", ".join(found))
    return Finding("instructions", State.NOTE, "no vector instructions known", "everything works, slowly")


def memory() -> Finding:
    from .memory.limits import available_bytes

    free = available_bytes()
    return Finding("memory", State.OK, f"{free / GB:.1f} GB free; `moesvd plan` says what a run needs of it")


def gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", State.OK, "none that torch can use; the CPU does all of it")
    count = torch.cuda.device_count()
    about = [torch.cuda.get_device_properties(index) for index in range(count)]
    return Finding("GPU", State.OK, ", ".join(f"{one.name} ({one.total_memory / GB:.0f} GB)" for one in about))


def cache() -> Finding:
    """The disk of statistics; MISSING where it cannot be written."""
    from .calibration.cache import cache_cap, cache_root

    root, cap = cache_root(), cache_cap()
    there = next(path for path in [root, *root.absolute().parents] if path.exists())
    if not os.access(there, os.W_OK):
        return Finding("cache", State.MISSING, f"{root} cannot be written", "set MOESVD_CACHE to a folder of yours")
    free = shutil.disk_usage(there).free
    value = f"{root}: {free / GB:.0f} GB free, of which statistics may take {cap / GB:.0f} GB (MOESVD_CACHE_SIZE)"
    if free < cap:
        return Finding("cache", State.NOTE, value, "for large models set MOESVD_CACHE to a larger disk")
    return Finding("cache", State.OK, value)


def hub(environment: Mapping[str, str]) -> Finding:
    """Whether models and texts may come from the hub. Local ones need no network."""
    from huggingface_hub import get_token

    if environment.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        return Finding("hub", State.NOTE, "offline (HF_HUB_OFFLINE)", "name local models and texts")
    token = "a token" if get_token() else "no token: gated models and --push need one (`hf auth login`)"
    return Finding("hub", State.OK, f"{token}; not needed for local models and texts")


def packages() -> list[Finding]:
    """Python and the packages that figures depend on, beside the tested versions."""
    tested = tested_versions()
    needed = {r.name.lower(): r for r in map(Requirement, requires("moesvd_quant") or []) if r.marker is None}
    python = ".".join(map(str, sys.version_info[:3]))
    return [Finding("Python", State.OK, python), *(_package(name, needed[name], tested) for name in PACKAGES)]


def _package(name: str, needed: Requirement, tested: Mapping[str, str]) -> Finding:
    try:
        here = version(name)
    except PackageNotFoundError:
        return Finding(name, State.MISSING, "not installed", f"pip install '{needed}'")
    if not needed.specifier.contains(here, prereleases=True):
        return Finding(name, State.MISSING, here, f"pip install '{needed}'")
    if here.split("+")[0] != tested[name]:
        return Finding(name, State.NOTE, here, f"tested with {tested[name]}")
    return Finding(name, State.OK, here)


def tested_versions() -> dict[str, str]:
    """{package: version} of the constraints that every release is tested with."""
    lines = files("moesvd_quant").joinpath("constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if "==" in line]
    return {name.lower().replace("_", "-"): number for name, number in pairs}


def extras() -> list[Finding]:
    return [_extra(extra, package) for extra, package in EXTRAS.items()]


def _extra(extra: str, package: str) -> Finding:
    try:
        return Finding(f"[{extra}]", State.OK, f"{package} {version(package)}")
    except PackageNotFoundError:
        return Finding(
            f"[{extra}]", State.NOTE, "not installed", f"pip install 'moesvd_quant[{extra}]', if you want it"
        )
