"""Statistics are computed once, reused, and bounded in size."""

import shutil

import pytest
import torch

from moesvd_quant.calibration import store
from moesvd_quant.calibration.recording import experts_at_once
from moesvd_quant.calibration.store import Statistics, fingerprint
from moesvd_quant.calibration.written import written_path
from moesvd_quant.memory.limits import Batches, Memory
from moesvd_quant.model.stream import StreamedModel
from moesvd_quant.planning import choices
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.plan import plan_stages
from moesvd_quant.run.run import Run

WINDOWS = torch.randint(1, 250, (4, 32), generator=torch.Generator().manual_seed(4))


def make(folder, root, windows=WINDOWS, cap=10**9):
    return Statistics(folder, fingerprint(folder), windows, cap_bytes=cap, root=root)


@pytest.fixture
def folder(make_model):
    return make_model("mixtral")


def test_second_pass_reads_the_files(folder, tmp_path, monkeypatch):
    first = list(make(folder, tmp_path).layers())
    monkeypatch.setattr(StreamedModel, "walk", lambda *_: pytest.fail("walked again"))
    second = list(make(folder, tmp_path).layers())
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_an_interrupted_walk_goes_on_to_the_same_bits(folder, tmp_path):
    whole = make(folder, tmp_path / "a")
    expected = list(whole.layers())
    part = make(folder, tmp_path / "b")

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        part.ensure(stop)
    assert part.path(0).is_file() and not part.complete()
    for a, b in zip(expected, part.layers(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert torch.equal(whole.outer(), part.outer())


def test_other_text_or_model_is_another_key(folder, tmp_path, make_model):
    keys = {
        make(folder, tmp_path).key,
        make(folder, tmp_path, WINDOWS + 1).key,
        make(make_model("olmoe"), tmp_path).key,
    }
    assert len(keys) == 3


def test_above_the_cap_nothing_is_stored(folder, tmp_path):
    statistics = make(folder, tmp_path, cap=1000)
    assert len(list(statistics.layers())) == 2 and not any(tmp_path.iterdir())
    assert statistics.outer().shape == (64, 64)


def test_the_oldest_statistics_make_room(folder, tmp_path):
    first = make(folder, tmp_path)
    list(first.layers())
    second = make(folder, tmp_path, WINDOWS + 1, cap=int(1.5 * first.needed))
    list(second.layers())
    assert not first.root.exists() and second.complete()


def test_effects_make_room_as_well(folder, tmp_path):
    first = make(folder, tmp_path)
    list(first.layers())
    second = make(folder, tmp_path, WINDOWS + 1, cap=int(1.5 * first.needed))
    second.effects()  # a budget asks for them before the statistics
    assert not first.root.exists()


@pytest.mark.parametrize("architecture,layer", [("mixtral", 1), ("qwen3_moe", 0), ("gpt_oss", 1)])
def test_few_experts_at_a_time_and_hidden_states_on_disk_give_the_same_bits(
    make_model, tmp_path, monkeypatch, architecture, layer
):
    folder = make_model(architecture)
    plenty = make(folder, tmp_path / "a")
    expected = list(plenty.layers())
    tight = Statistics(folder, fingerprint(folder), WINDOWS, root=tmp_path / "b", memory=Memory(1))
    files = []
    kept = Batches.__init__
    monkeypatch.setattr(Batches, "__init__", lambda self, f=None, d="cpu": files.append(f) or kept(self, f, d))
    assert experts_at_once(StreamedModel(folder).layers[layer], Memory(1), 0) == 1
    for a, b in zip(expected, tight.layers(), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert files and set(files) == {tmp_path / "b"}  # hidden states, and what later experts get
    assert {path.suffix for path in (tmp_path / "b").rglob("*") if path.is_file()} == {".safetensors"}
    assert torch.equal(plenty.outer(), tight.outer())
    assert plenty.effects() == tight.effects()


def test_three_ratios_need_one_walk(make_model, small, tmp_path, monkeypatch):
    walks = []
    walk = StreamedModel.walk
    monkeypatch.setattr(
        StreamedModel, "walk", lambda self, windows, *rest: walks.append(windows.numel()) or walk(self, windows, *rest)
    )
    spectra = []
    profile = choices.profile
    monkeypatch.setattr(choices, "profile", lambda *given: spectra.append(1) or profile(*given))
    for ratio in (0.2, 0.4, 0.6):
        recipe = load_recipe("svd-gptq4", [*small, "seed=7", f"svd.ratio={ratio}"])
        job = Run(recipe, make_model("olmoe"), tmp_path / str(ratio))
        job.run()
    assert len(spectra) == 2 * 6 * 2  # layers, experts, gate and up or down: once
    whole = job.windows.numel()
    # Once for the statistics and once for the effects; the others verify with a few tokens.
    assert [size for size in walks if size == whole] == [whole, whole]


@pytest.mark.parametrize(
    "constant", ["effect.PERTURBATION", "effect.TOKENS", "effect.LENGTH", "effect.LAYERS", "store.EFFECT_BATCH"]
)
def test_effects_are_measured_anew_when_what_they_depend_on_changes(folder, tmp_path, monkeypatch, constant):
    measured = []
    monkeypatch.setattr(store, "measure_effects", lambda *given: measured.append(1) or {("a", "up"): 1.0})
    make(folder, tmp_path).effects()
    assert make(folder, tmp_path).effects() == {("a", "up"): 1.0} and len(measured) == 1
    monkeypatch.setattr(f"moesvd_quant.calibration.{constant}", 2)
    make(folder, tmp_path).effects()
    assert len(measured) == 2


@pytest.mark.parametrize(
    "constant",
    ["planning.tables.SENSITIVITY_POWER", "planning.tables.LEAST_SENSITIVITY", "planning.choices.METRIC",
     "planning.choices.NOISE", "planning.choices.LEAST_PRICE", "calibration.effect.PERTURBATION"],
)  # fmt: skip
def test_profiles_are_made_anew_when_what_they_depend_on_changes(make_model, small, tmp_path, monkeypatch, constant):
    made, profile = [], choices.profile
    monkeypatch.setattr(choices, "profile", lambda *given: made.append(1) or profile(*given))
    recipe = load_recipe("svd", [*small, f"seed={sum(constant.encode())}"])
    plan = lambda: plan_stages(Run(recipe, make_model("mixtral"), tmp_path))  # noqa: E731
    plan()
    first = len(made)
    plan()
    assert len(made) == first
    value = "other" if constant.endswith(("METRIC", "NOISE")) else 4 if constant.endswith("PERTURBATION") else 0.5
    monkeypatch.setattr(f"moesvd_quant.{constant}", value)
    plan()
    assert len(made) == 2 * first


def test_what_the_model_wrote_depends_on_its_tokenizer(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    given = "digest", (4, 16), 0, "cpu"
    before = written_path(copy, *given)
    assert before == written_path(folder, *given)
    (copy / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    assert written_path(copy, *given) != before
