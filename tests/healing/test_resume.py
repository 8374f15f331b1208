"""Training that is interrupted, at any step, ends in the same files; nothing of it stays in a checkpoint."""

from functools import partial

import pytest
import torch

from killing import kill_until_done
from moesvd_quant.healing import layerwise, trainer
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.output import RunError
from moesvd_quant.run.run import Run

OPTIONS = "microbatch: 2, rank: 8, lr: 0.003, validation: 4, validate_every: 2, patience: 2"
RECIPE = "stages: [%s{lora: {%s}}]"


class Killed(BaseException):
    """As good as a kill: nothing catches it."""


@pytest.fixture
def make(compressed, make_model, tmp_path, small):
    """make(out, options) -> a run that heals a compressed model; by distillation, which needs the original, from it."""

    def make(out: str, more: str = "", steps: int = 8) -> Run:
        distill = "distill" in more
        before = "{svd: {ratio: 0.3}}, " if distill else ""
        (tmp_path / "r.yaml").write_text(RECIPE % (before, f"steps: {steps}, {OPTIONS}{more or ', batch: 4'}"))
        folder = make_model("mixtral") if distill else compressed("svd", "mixtral", "svd.ratio=0.3")
        return Run(load_recipe(tmp_path / "r.yaml", small), folder, tmp_path / out)

    return make


def files(run: Run) -> dict[str, bytes]:
    paths = [p for p in sorted(run.out.rglob("*")) if p.is_file() and p.name not in ("run.json", ".lock")]
    return {str(p.relative_to(run.out)): p.read_bytes() for p in paths}


def kill_at(monkeypatch, name: str, step: int):
    """A method of Watch, or of the trainer's saving, is the process's last when it is called after this step."""
    owner = trainer.Healer if name.startswith("_") else trainer.Watch
    method = getattr(owner, name)

    def dying(self, *args, **more):
        state = self.state if owner is trainer.Healer else args[1]
        if state.global_step == step:
            raise Killed
        return method(self, *args, **more)

    monkeypatch.setattr(owner, name, dying)


@pytest.mark.parametrize(
    "more,steps",
    [
        pytest.param("", 4, marks=pytest.mark.slow),
        pytest.param("", 8, marks=[pytest.mark.slow, pytest.mark.long]),
        pytest.param(", batch: 2, train: factors, in_turn: true", 8, marks=[pytest.mark.slow, pytest.mark.long]),
        pytest.param(", batch: 2, objective: distill", 8, marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def test_killed_at_every_step_and_in_every_save_the_files_are_the_same(make, monkeypatch, more, steps):
    make = partial(make, more=more, steps=steps)
    make("whole").run()
    steps = steps // 2 if "in_turn" in more else steps  # of each side
    moments = [("on_step_end", step) for step in range(1, steps + 1)]
    saves = ("_save_optimizer_and_scheduler", "on_save")
    moments += [(name, step) for step in range(2, steps + 1, 2) for name in saves]
    for name, step in sorted(moments, key=lambda moment: moment[1]):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, name, step)
            make("parts").run()
    run = make("parts")
    run.run()
    assert files(run) == files(make("whole"))
    assert not [name for name in files(run) if "optimizer" in name or name.endswith((".pt", ".pth", ".bin"))]


def test_a_layerwise_healing_goes_on_with_the_next_layer(make_model, tmp_path, small, monkeypatch):
    (tmp_path / "r.yaml").write_text(
        f"stages: [{{svd: {{ratio: 0.3}}}}, {{lora: {{steps: 8, {OPTIONS}, objective: layerwise}}}}]"
    )
    make = lambda out: Run(load_recipe(tmp_path / "r.yaml", small), make_model("mixtral"), tmp_path / out)  # noqa: E731
    make("whole").run()
    heal, healed = layerwise._heal_layer, []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(layerwise, "_heal_layer", lambda *given: _die_at(1, heal, *given))
        make("parts").run()
    monkeypatch.setattr(
        layerwise,
        "_heal_layer",
        lambda seed, options, streamed, visit, *rest: (
            healed.append(visit.index) or heal(seed, options, streamed, visit, *rest)
        ),
    )
    make("parts").run()
    assert healed == [1]
    assert files(make("parts")) == files(make("whole"))


def _die_at(index, heal, seed, options, streamed, visit, *rest):
    if visit.index == index:
        raise Killed
    return heal(seed, options, streamed, visit, *rest)


def test_other_text_to_train_on_is_noticed(compressed, tmp_path, small, text):
    (tmp_path / "r.yaml").write_text(RECIPE % ("", f"steps: 8, {OPTIONS}, batch: 4, dataset: {tmp_path}/mine.txt"))
    (tmp_path / "mine.txt").write_text(text.read_text())
    before = compressed("svd", "mixtral", "svd.ratio=0.3")

    def run():
        return Run(load_recipe(tmp_path / "r.yaml", small), before, tmp_path / "o").run()

    run()
    (tmp_path / "mine.txt").write_text(text.read_text()[::-1])
    with pytest.raises(RunError, match="01-lora: was made with another training; choose another --out"):
        run()


@pytest.mark.parametrize(
    "losses,patience,expected",
    [([3, 2, 1], 1, False), ([3, 2, 2], 1, True), ([1, 2, 3], 2, True), ([1, 2, 0.5], 2, False), ([1], 1, False)],
)
def test_training_stops_when_validation_no_longer_gains(losses, patience, expected):
    history = [{"step": i, "eval_loss": loss} for i, loss in enumerate(losses)] + [{"step": 9, "loss": 0.0}]
    assert trainer.stale(history, patience) is expected


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_kill_9_at_random_times(make, compressed, tmp_path, small):
    more = ", batch: 16"
    make("whole", more).run()
    arguments = ["run", str(tmp_path / "r.yaml"), *small, "--model", str(compressed("svd", "mixtral", "svd.ratio=0.3"))]
    threads = str(torch.get_num_threads())
    waits = (tenths / 10 for tenths in range(50, 400, 10))
    left = kill_until_done(arguments, tmp_path / "parts", waits, MOESVD_THREADS=threads)
    assert len({name for names in left for name in names if name.endswith("/whole")}) > 1  # in training, twice
    assert files(make("parts", more)) == files(make("whole", more))
