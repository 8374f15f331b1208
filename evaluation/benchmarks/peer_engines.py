"""Engines of others, each in an environment of its own, and what their results predict: for `make bench-peers`."""

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch

from moesvd_quant.errors import MoesvdError
from moesvd_quant.evaluation.memory import kind_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS, ENVIRONMENTS = Path(__file__).resolve().parent / "engines", ROOT / ".venv-peers"
OURS = "ours"  # the environment of this package, which has GPTQModel and bitsandbytes
# GPTQModel fails on two cores without the first, and compiles for minutes without the second.
SURROUNDINGS = {"GPTQMODEL_CPU_WORKERS": "2", "GPTQMODEL_DISABLE_PACK_EXT": "1", "CMAKE_BUILD_PARALLEL_LEVEL": "1"}


class PeerError(MoesvdError):
    """A peer that cannot run here, with the reason that it gives itself."""


@dataclass(frozen=True)
class Peer:
    """An engine at one setting. family: how lines of a plot are called; environment: of ENVIRONMENTS, or OURS."""

    name: str
    family: str
    environment: str
    script: str
    setting: str

    @property
    def python(self) -> Path:
        return Path(sys.executable) if self.environment == OURS else ENVIRONMENTS / self.environment / "bin/python"


@dataclass(frozen=True)
class Made:
    """A compressed model. bytes: all weight files; experts: of them in routed experts, without headers."""

    folder: Path
    bytes: int
    experts: int


def install(environment: str) -> None:
    """Makes the environment of a peer from its tested versions, once. PeerError says what pip said."""
    folder, listed = ENVIRONMENTS / environment, SCRIPTS / f"{environment}.txt"
    done = folder / ".installed"
    if environment == OURS or (done.is_file() and done.read_text() == listed.read_text()):
        return
    venv.create(folder, with_pip=True)
    _call(
        [folder / "bin/python", "-m", "pip", "install", "-q", "-r", listed],
        ENVIRONMENTS,
        ENVIRONMENTS / f"{environment}.log",
    )
    done.write_text(listed.read_text())


def make(peer: Peer, model: Path, windows: Path, out: Path) -> Made:
    """Compresses, or takes what is there. PeerError with the end of what the peer printed."""
    folder = out / peer.name
    if not (folder / "sizes.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
        out.mkdir(parents=True, exist_ok=True)
        given = [model.resolve(), windows.resolve(), peer.setting, folder.resolve()]
        _call([peer.python, SCRIPTS / peer.script, "make", *given], out, out / f"{peer.name}.log")
    sizes = json.loads((folder / "sizes.json").read_text())
    files = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    experts = sum(size for name, size in sizes.items() if kind_of(name) == "experts")
    return Made(folder, sum(file.stat().st_size for file in files), experts)


def write_importance(model: Path, windows: Path) -> None:
    """llama.cpp's importance matrix of the calibration windows, beside their file."""
    out = windows.with_name("importance.safetensors").resolve()
    command = [sys.executable, SCRIPTS / "importance.py", model.resolve(), windows.resolve(), out]
    _call(command, windows.parent, windows.with_name("importance.log"))


def predictions(peer: Peer, made: Made, windows: Path, shape: tuple[int, int]) -> Iterator[torch.Tensor]:
    """Logits (1, length, vocabulary) float32 of the windows of all texts, one after the other, as the peer's own engine
    computes them: they come through a pipe, so that nothing of it lies on disk. shape: (length, vocabulary)."""
    read, write = os.pipe()
    log = made.folder / "logits.log"
    given = [windows.resolve(), made.folder.resolve(), f"/dev/fd/{write}"]
    command = [peer.python, SCRIPTS / peer.script, "logits", *given]
    with log.open("w") as said, os.fdopen(read, "rb") as pipe:
        process = subprocess.Popen(
            list(map(str, command)), env=_environment(), cwd=made.folder, pass_fds=[write], stdout=said, stderr=said
        )
        os.close(write)  # the peer has it: its end is the end of the stream
        try:
            yield from received(pipe, shape)
            if process.wait():
                raise PeerError(_reason(command, log))
        finally:
            process.kill()
            process.wait()


def received(pipe: IO[bytes], shape: tuple[int, int]) -> Iterator[torch.Tensor]:
    """Float32 rows of `shape` out of a stream; PeerError where it ends within one."""
    size = 4 * shape[0] * shape[1]
    while content := pipe.read(size):
        if len(content) < size:
            raise PeerError(f"the logits of a window end after {len(content)} of {size} bytes")
        row = np.frombuffer(content, np.float32)
        if not np.isfinite(row).all():
            raise PeerError("its logits are not finite")
        yield torch.from_numpy(row.reshape(1, *shape).copy())


def _environment() -> dict[str, str]:
    return os.environ | SURROUNDINGS


def _call(command: list, folder: Path, log: Path) -> None:
    with log.open("w") as said:
        done = subprocess.run(list(map(str, command)), env=_environment(), cwd=folder, stdout=said, stderr=said)
    if done.returncode:
        raise PeerError(_reason(command, log))


def _reason(command: list, log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{Path(command[1]).name} failed: {lines[-1] if lines else 'without a word'} ({log})"
