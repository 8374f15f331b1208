"""Runs a recipe: for each stage plan, work layer by layer, verify, commit. Interrupted at any point, the
same command goes on where it was."""

import shutil
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from ..calibration.store import Statistics, fingerprint
from ..checkpoint.accounting import account
from ..checkpoint.finish import refresh
from ..checkpoint.layout import layout_of
from ..checkpoint.unused import require_carried
from ..memory.files import read_json, require_space, require_writable, write_json, write_text
from ..memory.limits import Memory, PeakMeter
from ..memory.pool import Pool
from ..model.stream import StreamedModel
from ..planning.context import Context, Plan
from ..recipe.recipe import Recipe
from ..runtime.parts import layout_from
from .forecast import Needs, forecast
from .key import short_digest, stage_key
from .output import RunError, check_key, locked
from .plan import plan_stages
from .seconds import Seconds, forecast_seconds, measured_rates
from .stage_work import StageWork
from .training_text import windows_to_train_on, with_written

Report = Callable[[str, int, int], None]  # what, done, total


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
        self.memory = Memory(how.get("memory"))
        self.pool = Pool(how.get("workers", 1), how.get("executor", "processes"))
        share = self.memory.share(self.pool.workers)
        self.statistics = self._statistics(share)
        self._training = windows_to_train_on(recipe, self.meta, self.statistics.shape[1])

    def opened(self, folder: Path) -> StreamedModel:
        """A model folder as the recipe takes it."""
        leave_out = self.recipe.unused_tensors == "leave_out"
        return StreamedModel(folder, None, self.device, self.recipe.experts == "all", leave_out, self.recipe.balance)

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
        more = {"memory": memory, "shape": shape, "shared": self.meta.shared, "balanced": self.recipe.balance}
        return Statistics(self.model, self.model_digest, windows, self.device, **more)

    @property
    def windows(self) -> torch.Tensor:
        """(n, length) int64 of calibration."""
        return self.statistics.windows

    def training(self, index: int):
        """The windows that a stage trains on; None for one that does not train."""
        return self._training.get(index)

    def key(self, upto: int) -> dict:
        """All that a stage's output depends on; equal keys mean equal files."""
        trained = [made.digest for index, made in sorted(self._training.items()) if index <= upto]
        return stage_key(self.recipe, upto, self.model_digest, self.statistics.key, trained)

    def folder(self, index: int) -> Path:
        return self.out / f"{index + 1:02d}-{self.recipe.stages[index].name}"

    def run(self) -> list[Path]:
        """Runs all stages; the folders of their checkpoints. Finished stages and layers are not done again."""
        with locked(self.out), closing(self.pool):
            for index in range(len(self.recipe.stages)):
                check_key(self.folder(index), self.key(index))
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

    def seconds(self) -> Seconds:
        """Forecast of time, from a short measurement of this machine; evaluation and what is done already left out."""
        from ..calibration.windows import written_count

        stored = self.statistics
        stages = [stage for index, stage in enumerate(self.recipe.stages) if not self._done(index)]
        trained = [stage.training_text() for stage in stages]
        length = stored.shape[1]
        rates = measured_rates(stages, self.device)
        return forecast_seconds(
            self.meta,
            stages,
            rates,
            stored.shape,
            written_count(self.recipe.calibration) if stored.unmade else 0,
            stored.complete(),
            sum(text.windows * (text.length or length) for text in trained if text),
            self.pool.workers,
        )

    def work_folder(self, index: int) -> Path:
        return self.out / f".work-{index + 1:02d}-{self.recipe.stages[index].name}-{short_digest(self.key(index))}"

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
        self._clean(keep=work)
        if not work.finished.exists():
            work.folder.mkdir(exist_ok=True)
            plan = work.prepare(self.plan(index, context.parent))
            accounting = account(context.parent, plan.layout)
            with meter:
                work.layers(plan)
                work.finish(plan, accounting)
        work.commit(folder)
        write_json(
            folder / "run.json",
            {
                "seconds": round(time.time() - started, 2),
                "walk_layer_seconds": self.statistics.take_seconds(),
                "layer_seconds": work.layer_seconds,
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
        context.training = with_written(self.training(index), self.recipe, index, self.windows)
        context.report = self.report
        context.folder = self.work_folder(index)
        return context

    def _clean(self, keep: StageWork) -> None:
        """Leftovers of runs that were killed and whose key no longer matches."""
        number = keep.folder.name.split("-")[1]
        for path in [*self.out.glob(f".work-{number}-*"), *self.out.glob(f".finished-{number}-*")]:
            if path not in (keep.folder, keep.finished):
                shutil.rmtree(path)
