"""The work of one stage in its own folder: layers one by one, each file whole or absent, then the commit."""

import json
import math
import time
from functools import partial
from pathlib import Path

import torch

from ..checkpoint import finish, verify
from ..checkpoint.accounting import Accounting, by_file, planned_model
from ..checkpoint.card import write_card
from ..checkpoint.unused import UNUSED_FILE, empty_tensors, without_unused, write_unused
from ..memory.files import commit_folder, write_json, write_tensors
from ..model.carried import carry_files
from ..model.layered import is_finite
from ..model.stream import StreamedModel
from ..planning.context import Context, Plan, StageError
from ..runtime.parts import projections_from, projections_to

CHECK_WINDOWS, CHECK_LENGTH = 2, 128
CHUNK = 32  # tokens whose predictions are compared at a time


class StageWork:
    """One stage of a run: `prepare`, `layers`, `finish`, then `commit`; each finds what an earlier process did."""

    def __init__(self, run, index: int, context: Context):
        self.run, self.index, self.context, self.stage = run, index, context, context.stage
        self.folder: Path = run.work_folder(index)
        self.finished = self.folder.with_name(self.folder.name.replace(".work-", ".finished-", 1))
        self.parent: StreamedModel = context.parent
        self.layer_seconds: list[float] = []  # of each layer's work, when the stage is finished

    def layers(self, plan: Plan) -> None:
        count = len(self.parent.layer_names)
        todo = [i for i in range(count) if not (self.folder / finish.layer_file(i)).is_file()]
        if todo and self.stage.in_order():
            todo = list(range(count))
        report = lambda done, total: self.run.report(f"{self.stage.name}: layers", done, total)  # noqa: E731
        for _ in self.context.each_layer(partial(make_layer, self.folder, plan), report, todo):
            pass
        if not (self.folder / finish.OUTER_FILE).is_file():
            self._outer(plan)

    def prepare(self, plan: Plan) -> Plan:
        """What a stage does before it goes through the layers: training, after which its plan may be another."""
        return self.stage.prepare(self.context, plan, self.folder)

    def _outer(self, plan: Plan) -> None:
        self.parent.load_outer()
        report = self.stage.run_outer(self.context, plan)
        model = self.parent.model
        names = by_file(model, self.parent.layer_names)["outer"]
        tensors = {name: tensor for name, tensor in names.items() if tensor.device.type != "meta"}
        if lost := sorted(set(names) - set(tensors)):
            raise StageError(f"{self.parent.folder}: tensors outside the layers were not read: {lost[:5]}")
        _check("outer", tensors, report, self.stage.name)
        seen = verify.outputs(model, verify.targets(plan.layout, "lm_head"))
        write_json(note_file(self.folder, "outer"), {"errors": report, "experts": {}, "outputs": seen})
        write_tensors(self.folder / finish.OUTER_FILE, tensors)

    def finish(self, plan: Plan, accounting: Accounting) -> None:
        """Index, config, tokenizer, manifest; opens the checkpoint as a user would; the folder is `finished` then."""
        notes = [str(i) for i in range(len(self.parent.layer_names))] + ["outer"]
        errors: dict = {}
        outputs: dict = {}
        for name in notes:
            note = json.loads(note_file(self.folder, name).read_text())
            errors |= note["errors"]
            self.layer_seconds += [round(note["seconds"], 3)] if "seconds" in note else []
            outputs |= note["outputs"]
            plan.layout.experts |= {path: projections_from(found) for path, found in note["experts"].items()}
        self._describe(plan)
        check = self._verify(plan, outputs)
        origin = finish.origin_of(self.run.model)
        manifest = {
            "name": self._name(origin["names"]),
            "base_model": self.run.recipe.model or origin["base_model"],
            "licence": finish.licence_of(self.run.model),
            "carried": carry_files(self.run.model, self.folder),
            "stages": self.run.key(self.index)["stages"],
            "key": self.run.key(self.index),
            "versions": self.run.key(self.index)["versions"],
            "recipe": self.run.recipe.to_yaml(),
            "decisions": plan.decisions,
            "notes": plan.notes,
            "errors": errors,
            "accounting": accounting.to_dict(),
            "check": check,
        }
        write_card(self.folder, manifest)
        finish.write_manifest(self.folder, manifest)
        commit_folder(self.folder, self.finished)

    def commit(self, final: Path) -> None:
        """Removes what served the work alone from the finished folder, and gives it its name. May be repeated: where a
        process is killed meanwhile, nothing of what was removed is needed any more."""
        self.stage.conclude(self.finished)
        for note in self.finished.glob("note-*.json"):
            note.unlink()
        commit_folder(self.finished, final)

    def _name(self, before: list[str]) -> str:
        """Short name in tables: svd40-gptq3; svd-gptq@2.3bpw where a budget decided, +shared with shared experts."""
        stages = self.run.recipe.stages[: self.index + 1]
        budget = f"@{self.run.recipe.budget}" if any(s.needs_budget() for s in stages) else ""
        shared = "+shared" if self.run.recipe.experts == "all" else ""
        return "-".join([*before, *(s.label() for s in stages)]) + shared + budget

    def _describe(self, plan: Plan) -> None:
        files = by_file(planned_model(self.parent, plan.layout), self.parent.layer_names)
        names = [finish.layer_file(i) for i in range(len(self.parent.layer_names))] + [finish.OUTER_FILE]
        write_unused(self.parent, self.folder)
        if unused := empty_tensors(self.parent.unused()):
            files, names = files | {"unused": unused}, [*names, UNUSED_FILE]
        tensors = {key: name for name, owned in zip(names, files.values()) for key in owned}
        total = sum(t.numel() * t.element_size() for owned in files.values() for t in owned.values())
        finish.write_index(self.folder, tensors, total)
        config = self.parent.config.to_dict()
        if self.parent.leave_out:
            config = without_unused(config)
        finish.write_config(self.folder, config, plan.layout.to_dict())

    def _verify(self, plan: Plan, outputs: dict) -> dict:
        """Reads the checkpoint back from disk: every target computes what it did in memory, bit for bit, and
        the whole model runs. {"kl": nats per token to its input, "tokens"}; StageError otherwise."""
        verify.check_reload(StreamedModel(self.folder, device=self.run.device), plan.layout, outputs)
        changed = self.stage.changes(self.context, plan)
        verify.check_carried(self.run.opened(self.parent.folder), self.folder, plan.layout, changed)
        windows = self.run.windows[:CHECK_WINDOWS, :CHECK_LENGTH]
        before, after = (
            next(self.run.statistics.model(folder).logits(windows, len(windows))).flatten(0, 1)
            for folder in (self.parent.folder, self.folder)
        )
        total = 0.0
        for one, two in zip(before.split(CHUNK), after.split(CHUNK)):
            if not torch.isfinite(two).all():
                raise StageError(f"stage {self.stage.name}: the reloaded checkpoint gives logits that are not finite")
            p, q = one.double().log_softmax(-1), two.double().log_softmax(-1)
            total += float((p.exp() * (p - q)).sum())
        return {"kl": total / windows.numel(), "tokens": windows.numel()}


def note_file(folder: Path, name: str) -> Path:
    """What was decided and measured while a file was made; written before the file."""
    return folder / f"note-{name}.json"


def make_layer(folder: Path, plan: Plan, context: Context, index: int, layer, statistics: dict) -> None:
    """Turns a loaded layer into the file of a stage's output, and its note, in the work folder."""
    parent, started = context.parent, time.perf_counter()
    name = parent.layer_names[index]
    report = context.stage.run_layer(context, index, layer, statistics, plan)
    parent.restore_native(index)
    own = {path: parts for path, parts in plan.layout.experts.items() if path.startswith(name + ".")}
    layout = {path: projections_to(projections) for path, projections in own.items()}
    seen = verify.outputs(parent.model, verify.targets(plan.layout, name + "."))
    tensors = {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
    _check(name, tensors, report, context.stage.name)
    seconds = time.perf_counter() - started
    note = {"errors": report, "experts": layout, "outputs": seen, "seconds": seconds}
    write_json(note_file(folder, str(index)), note)
    write_tensors(folder / finish.layer_file(index), tensors)


def _check(name: str, tensors: dict, report: dict, stage: str) -> None:
    """StageError where something is not finite."""
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            raise StageError(f"{key}: became not finite in stage {stage}; this is a defect")
    for path, value in _errors(report):
        if not math.isfinite(value):
            raise StageError(f"{path}: error {value} in stage {stage}; raise damp or add calibration")


def _errors(report, path=""):
    if isinstance(report, float):
        yield path, report
    elif isinstance(report, dict):
        for key, value in report.items():
            yield from _errors(value, f"{path}.{key}" if path else str(key))
    elif isinstance(report, list):
        for i, value in enumerate(report):
            yield from _errors(value, f"{path}[{i}]")
