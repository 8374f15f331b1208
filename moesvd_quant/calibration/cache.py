"""The folder of all statistics on disk: where it is, its size cap, and folders in it that are gone after their use."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import psutil

from ..memory.limits import parse_bytes

WALK = ".walk-"  # of folders that live as long as their process


def cache_root() -> Path:
    """Where statistics are kept: $MOESVD_CACHE, or .cache/moesvd_quant in the home folder."""
    return Path(os.environ.get("MOESVD_CACHE") or Path.home() / ".cache" / "moesvd_quant")


def name_of(what: str, **depends) -> str:
    """Name of a thing that is kept: what it is, and a digest of all that it depends on. Whatever a stored value depends
    on, constants of the code included, goes through here, so that a change of any is noticed."""
    content = json.dumps(depends, sort_keys=True, default=str)
    return f"{what}-{hashlib.sha256(content.encode()).hexdigest()[:32]}"


def cache_cap() -> int:
    """Bytes that all statistics may take: $MOESVD_CACHE_SIZE (`200GB`), or 64 GB."""
    return parse_bytes(os.environ.get("MOESVD_CACHE_SIZE") or "64GB", "MOESVD_CACHE_SIZE")


def make_room(store: Path, needed: int, cap: int) -> None:
    """Removes those statistics in `store` that were written longest ago, until `needed` bytes more are within `cap`."""
    sizes = {
        folder: sum(file.stat().st_size for file in folder.iterdir())
        for folder in sorted(store.glob("[!.]*"), key=lambda path: path.stat().st_mtime)
    }
    for folder in list(sizes):
        if sum(sizes.values()) + needed > cap:
            shutil.rmtree(folder)
            del sizes[folder]


def walk_folder(store: Path) -> tempfile.TemporaryDirectory:
    """A folder on the disk of `store` for what is not kept; leftovers of processes that were killed go."""
    store.mkdir(parents=True, exist_ok=True)
    for leftover in store.glob(f"{WALK}*"):
        if not psutil.pid_exists(int(leftover.name.split("-")[-2])):
            shutil.rmtree(leftover, ignore_errors=True)
    return tempfile.TemporaryDirectory(dir=store, prefix=f"{WALK}{os.getpid()}-")
