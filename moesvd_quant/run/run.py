"""Runs a recipe: for each stage plan, work layer by layer, verify, commit. Interrupted at any point, the
same command goes on where it was."""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import closing, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from .. import __version__
from ..calibration.store import Statistics, fingerprint
from ..checkpoint.accounting import account
from ..checkpoint.finish import refresh
from ..checkpoint.layout import layout_of
from ..checkpoint.unused import require_carried
from ..errors import MoesvdError
from ..memory.files import read_json, require_space, require_writable, write_json, write_text
from ..memory.limits import Memory, PeakMeter, disable_malloc_cache
from ..memory.pool import Pool
from ..model.stream import StreamedModel
from ..model.tokenizer import load_tokenizer
from ..planning.context import Context, Plan
from ..recipe.recipe import Recipe
from ..recipe.stage import TrainingText
from ..runtime.modeling_moesvd import MANIFEST
from ..runtime.parts import layout_from
from .forecast import Needs, forecast
from .plan import plan_stages
from .stage_work import StageWork

Report = Callable[[str, int, int], None]  # what, done, total


class RunError(MoesvdError, RuntimeError):
    """A run that cannot go on; the message says what is in the way and what to do."""


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "gptqmodel", "peft", "bitsandbytes", "safetensors")
    return {"moesvd_quant": __version__} | {name: version(name) for name in names}


@contextmanager
def locked(out: Path):
    """One run per output folder: RunError where another process holds it."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{out}: another run is working here; wait for it or choose another --out") from None
        yield


class Run:
    """A recipe on a model, with its output folder. `report(what, done, total)` hears of progress."""

    def __init__(self, recipe: Recipe, model: Path, out: Path, device="cpu", report: Report | None = None, **how):
        """how: `memory` (bytes or None), `workers`, `executor`; nothing of it is part of the result."""
        self.recipe, self.model, self.out = recipe, Path(model), Path(out)
        self.device = torch.device(device)
        self.report = report or (lambda what, done, total: None)
        if self.out.resolve() == self.model.resolve():
            raise RunError(f"{out}: is the model's own folder; choose another --out")
        require_writable(self.out)
        self.meta = self.opened(self.model)
        require_carried(self.meta)
        if gone := next(iter(layout_of(self.meta).sources), None):
            raise RunError(
                f"{self.model}: {gone} has lost some of the original's experts; run all stages in one recipe on "
                "the original, or export this checkpoint with --to dense and start from that"
            )
        self.model_digest = fingerprint(self.model)
        disable_malloc_cache()
        self.memory = Memory(how.get("memory"))
        self.pool = Pool(how.get("workers", 1), how.get("executor", "processes"))
        share = self.memory.share(self.pool.workers)
        self.statistics = self._statistics(share)
        texts = {index: stage.training_text() for index, stage in enumerate(recipe.stages)}
        self._training = {index: self._training_windows(text, index) for index, text in texts.items() if text}

    def opened(self, folder: Path) -> StreamedModel:
        """A model folder as the recipe takes it."""
        leave_out = self.recipe.unused_tensors == "leave_out"
        return StreamedModel(folder, None, self.device, self.recipe.experts == "all", leave_out)

    def _statistics(self, memory: Memory) -> Statistics:
        from ..calibration.windows import length_of, must_write, windows_of

        wanted, seed = self.recipe.calibration, self.recipe.seed
        length = length_of(self.model, self.meta.config, wanted.length, "calibration.length")
        progress = partial(self.report, "calibration text of the model itself")

        def make() -> torch.Tensor:
            return windows_of(wanted, self.model, self.model_digest, length, seed, self.device, memory, progress)

        def make_if_it_fits() -> torch.Tensor:
            self.needs().require(self.statistics.store)
            return make()

        later = must_write(wanted, self.model, self.model_digest, length, seed, self.device)
        windows, shape = make_if_it_fits if later else make(), (wanted.samples, length)
        more = {"memory": memory, "shape": shape, "shared": self.meta.shared}
        return Statistics(self.model, self.model_digest, windows, self.device, **more)

    @property
    def windows(self) -> torch.Tensor:
        """(n, length) int64 of calibration."""
        return self.statistics.windows

    def _training_windows(self, text: TrainingText, index: int):
        from ..calibration.windows import length_of
        from ..healing.data import refuse_leaks, training_windows

        tokenizer = load_tokenizer(self.model)
        source = text.dataset or self.recipe.calibration.dataset
        length = self.statistics.shape[1]
        if text.length is not None:
            length = length_of(self.model, self.meta.config, text.length, f"{self.recipe.stages[index].name}.length")
        made = training_windows(source, tokenizer, text.windows, text.validation, length, self.recipe.seed)
        refuse_leaks(made, self.recipe.evaluate.texts(), tokenizer)
        return made

    def training(self, index: int):
        """The windows that a stage trains on; None for one that does not train."""
        return self._training.get(index)

    def _training_with_written(self, index: int):
        """Training windows of a stage that runs: its share of text that the model writes is that of calibration."""
        made, calibration = self.training(index), self.recipe.calibration
        text = self.recipe.stages[index].training_text()
        if made is None or text is None or not text.self_written:
            return made
        from ..calibration.windows import written_among

        written = written_among(calibration, self.windows, self.recipe.seed)
        return made.with_written(written, calibration.self_written, self.recipe.seed)

    def key(self, upto: int) -> dict:
        """All that a stage's output depends on; equal keys mean equal files."""
        stages = [{s.name: s.model_dump()} for s in self.recipe.stages]
        budget = self.recipe.budget
        trained = [made.digest for index, made in sorted(self._training.items()) if index <= upto]
        return {
            "model": self.model_digest,
            "statistics": self.statistics.key,
            "stages": stages[: upto + 1],
            "seed": self.recipe.seed,
            # Under a budget the first stage is planned for what the later ones do.
            "budget": None
            if budget is None
            else {"amount": budget, "stages": stages, "limits": self.recipe.limits.model_dump()},
            "versions": versions(),
            "unused_tensors": self.recipe.unused_tensors,
        } | ({"training": trained} if trained else {})

    def folder(self, index: int) -> Path:
        return self.out / f"{index + 1:02d}-{self.recipe.stages[index].name}"

    def run(self) -> list[Path]:
        """Runs all stages; the folders of their checkpoints. Finished stages and layers are not done again."""
        with locked(self.out), closing(self.pool):
            for index in range(len(self.recipe.stages)):
                self._check_key(self.folder(index), index)
            write_text(self.out / "recipe.yaml", self.recipe.to_yaml())
            if not self._done(len(self.recipe.stages) - 1):
                self.needs().require(self.statistics.store)
            self.forecasts = self._forecasts()
            todo = [f for i, f in enumerate(self.forecasts) if not self._done(i)]
            require_space(self.out, sum(f["accounting"]["disk_bytes"] for f in todo))
            folders = [self._stage(index) for index in range(len(self.recipe.stages))]
            if self.recipe.keep == "last":
                for folder in folders[:-1]:
                    shutil.rmtree(folder, ignore_errors=True)
                folders = folders[-1:]
            return folders

    def needs(self) -> Needs:
        """Forecast of memory and disk, beside the checkpoints."""
        stored = self.statistics
        tokens = stored.shape[0] * stored.shape[1]
        workers, stages = self.pool.workers, self.recipe.stages
        return forecast(self.meta, stored.sizes, tokens, stored, stored.memory, workers, stages)

    def work_folder(self, index: int) -> Path:
        digest = hashlib.sha256(json.dumps(self.key(index), sort_keys=True).encode()).hexdigest()
        return self.out / f".work-{index + 1:02d}-{self.recipe.stages[index].name}-{digest[:12]}"

    def _check_key(self, folder: Path, index: int) -> None:
        """RunError where the folder holds the result of something else."""
        if not folder.exists():
            return
        if not (folder / MANIFEST).is_file():
            raise RunError(f"{folder}: exists and is no checkpoint of ours; choose another --out")
        found, wanted = read_json(folder / MANIFEST).get("key", {}), self.key(index)
        if changed := [k for k in wanted if found.get(k) != wanted[k]]:
            raise RunError(
                f"{folder}: was made with another {' and '.join(changed)}; choose another --out, or delete "
                "the folder to make it anew. Nothing was changed"
            )

    def _done(self, index: int) -> bool:
        """With `keep: last` an earlier stage may be gone because the last one is there."""
        gone = self.recipe.keep == "last" and self.folder(len(self.recipe.stages) - 1).exists()
        return gone or self.folder(index).exists()

    def _forecasts(self) -> list[dict]:
        """The plan of all stages, made before any weight is changed and kept in OUT/plan.json."""
        path, key = self.out / "plan.json", self.key(len(self.recipe.stages) - 1)
        if path.is_file():
            content = read_json(path)
            if content["key"] == key:
                return content["stages"]
        write_json(path, {"key": key, "stages": plan_stages(self)})
        return read_json(path)["stages"]  # as the run will read them that goes on after an interruption

    def plan(self, index: int, parent: StreamedModel) -> Plan:
        """The forecast of a stage, with the rows of shared factors as the checkpoint that is there has settled them."""
        forecast = self.forecasts[index]
        layout = layout_from(forecast["layout"])
        settled = layout_of(parent).experts if index else {}
        for path, projections in layout.experts.items():
            for name, parts in projections.items():
                for part, was in zip(parts, settled.get(path, {}).get(name, [])):
                    part.take_rows_from(was)
        return Plan(layout, forecast["decisions"], forecast["notes"])

    def _stage(self, index: int) -> Path:
        folder = self.folder(index)
        if self._done(index):
            if folder.exists():
                refresh(self.model, folder)
            return folder
        context = self.context(index)
        started, meter = time.time(), PeakMeter()
        work = StageWork(self, index, context)
        self._clean(keep=work.folder)
        work.folder.mkdir(exist_ok=True)
        plan = work.prepare(self.plan(index, context.parent))
        accounting = account(context.parent, plan.layout)
        with meter:
            work.layers(plan)
            work.finish(plan, accounting, folder)
        write_json(
            folder / "run.json",
            {
                "seconds": round(time.time() - started, 2),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "anonymous_bytes": {"before": meter.start, "peak": meter.peak},
                "threads": torch.get_num_threads(),
                "model": str(self.model),
            },
        )
        return folder

    def context(self, index: int) -> Context:
        """What a stage is given to run; its input checkpoint must be there."""
        parent = self.model if index == 0 else self.folder(index - 1)
        stage = self.recipe.stages[index]
        progress = lambda done, total: self.report(f"{stage.name}: reading the model", done, total)  # noqa: E731
        context = Context(self.opened(parent), self.statistics, stage, self.recipe.seed, self.device, progress)
        context.pool = self.pool
        context.training, context.report = self._training_with_written(index), self.report
        context.folder = self.work_folder(index)
        return context

    def _clean(self, keep: Path) -> None:
        """Leftovers of runs that were killed and whose key no longer matches."""
        for path in self.out.glob(".work-*"):
            if path != keep and path.name.split("-")[1] == keep.name.split("-")[1]:
                shutil.rmtree(path)


def sync_threads() -> None:
    """Threads per task are part of the result's last bits; two by default, $MOESVD_THREADS otherwise."""
    torch.set_num_threads(int(os.environ.get("MOESVD_THREADS", "2")))
