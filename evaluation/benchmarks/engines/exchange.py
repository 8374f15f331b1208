"""What the peers' scripts share: tokens come in by a file, logits go out by a pipe. numpy alone is needed."""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

CALIBRATION = "calibration"


def calibration(windows: Path) -> np.ndarray:
    """(n, length) int64: what every engine calibrates on."""
    return load_file(windows)[CALIBRATION]


def texts(windows: Path) -> np.ndarray:
    """(n, length) int64: the windows of all texts, in the order of their names."""
    found = load_file(windows)
    return np.concatenate([found[name] for name in sorted(found) if name != CALIBRATION])


def write_logits(rows: Iterable[np.ndarray], pipe: Path) -> None:
    """rows: (length, vocabulary) of each window in the order of `texts`. Written as float32, one by one, so that
    nothing of it lies on disk."""
    with open(pipe, "wb") as out:
        for row in rows:
            out.write(np.ascontiguousarray(row, dtype=np.float32).tobytes())


def write_sizes(sizes: dict[str, int], folder: Path) -> None:
    """Stored bytes of each tensor, by its name."""
    (folder / "sizes.json").write_text(json.dumps(sizes, indent=1))


def safetensors_sizes(folder: Path) -> dict[str, int]:
    """Stored bytes of each tensor of a folder's safetensors files."""
    sizes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        spans = {name: about["data_offsets"] for name, about in header.items() if name != "__metadata__"}
        sizes |= {name: end - begin for name, (begin, end) in spans.items()}
    return sizes


def main(make: Callable[[Path, Path, str, Path], None], logits: Callable[[Path, Path], Iterable[np.ndarray]]) -> None:
    """`make MODEL WINDOWS SETTING OUT` compresses; `logits WINDOWS OUT PIPE` writes what the result predicts."""
    verb, *given = sys.argv[1:]
    if verb == "make":
        model, windows, setting, out = given
        make(Path(model), Path(windows), setting, Path(out))
    else:
        windows, out, pipe = given
        write_logits(logits(Path(windows), Path(out)), Path(pipe))
