"""A checkpoint of a run, as reports need it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..memory.files import read_json
from ..runtime.modeling_moesvd import MANIFEST
from ..runtime.parts import Layout, layout_from

PROJECTIONS = ("gate", "up", "gate_up", "down")


@dataclass(frozen=True)
class Stage:
    """A checkpoint of a run, as the report needs it."""

    folder: Path
    manifest: dict
    layout: Layout
    run: dict  # seconds, peak memory, date; empty where the checkpoint travelled without
    shapes: dict[str, dict[str, tuple[int, int]]]  # of each experts module
    experts: dict[str, int]
    bits: int  # of an original weight

    @property
    def name(self) -> str:
        return self.manifest["name"]


def stage_of(folder: Path) -> Stage:
    manifest = read_json(folder / MANIFEST)
    config = read_json(folder / "config.json")
    run = folder / "run.json"
    timed = read_json(run) if run.is_file() else {}
    return Stage(folder, manifest, layout_from(config["moesvd"]), timed, *_shapes(folder))


def _shapes(folder: Path) -> tuple[dict, dict, int]:
    """(out, in) of the projections of each experts module, gate and up as one as well; experts in each; bits of an
    original weight."""
    from ..checkpoint.accounting import original_model
    from ..model.experts import all_shapes, expert_count, find_experts
    from ..model.stream import StreamedModel

    parent = StreamedModel(folder)
    found = dict(find_experts(original_model(parent)))
    shapes = {path: all_shapes(experts) for path, experts in found.items()}
    return shapes, {p: expert_count(experts) for p, experts in found.items()}, 8 * parent.stored_dtype.itemsize


def mean_error(errors) -> float | None:
    """Mean of the numbers in a report of errors, whatever its nesting."""
    found: list[float] = []
    todo = [errors]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list):
            todo += value
        elif isinstance(value, int | float):
            found.append(float(value))
    return float(np.mean(found)) if found else None
