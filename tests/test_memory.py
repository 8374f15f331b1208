"""Limits are parsed, counted and kept; what cannot fit is refused with what would make it fit."""

import gc

import pytest
import torch

from moesvd_quant import cli
from moesvd_quant.memory.limits import Batches, Memory, MemoryLimitError, PeakMeter, anonymous_bytes, parse_bytes
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run
from tiny import tensor_bytes


@pytest.mark.parametrize("text,size", [("16GB", 16 * 10**9), ("512 MiB", 512 * 2**20), ("1.5gb", 1500 * 10**6)])
def test_sizes_with_units(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["16", "GB", "-1GB", "0GB", "2bpw", ""])
def test_no_sizes(text):
    with pytest.raises(ValueError, match="write bytes with a unit"):
        parse_bytes(text)


def test_the_meter_sees_what_came_and_went():
    with PeakMeter(0.001) as meter:
        held = torch.ones(25_000_000)
        del held
    assert 95e6 < meter.peak - meter.start < 150e6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_batches_on_disk_are_those_in_memory_and_leave_no_file(tmp_path, dtype):
    given = [(torch.randn(n, 3, 5) * 100).to(dtype) for n in (4, 4, 2)]
    kept, held = Batches(tmp_path / "scratch"), Batches()
    for tensor in given:
        kept.append(tensor)
        held.append(tensor)
    assert len(kept) == len(held) == 3
    for a, b, c in zip(kept, held, given, strict=True):
        assert a.dtype == dtype and torch.equal(a, c) and torch.equal(b, c)
    kept[0].zero_()
    assert torch.equal(kept[0], given[0])
    assert not list((tmp_path / "scratch").iterdir())
    assert kept.like().folder == kept.folder and len(kept.like()) == 0


def test_batches_on_disk_take_no_memory(tmp_path):
    kept, batch = Batches(tmp_path), torch.ones(1_000_000)
    gc.collect()
    before = anonymous_bytes()
    for _ in range(50):
        kept.append(batch)
    assert anonymous_bytes() - before < 20e6
    assert float(kept[49].sum()) == 1e6


def test_as_many_as_fit_and_never_none():
    memory = Memory(anonymous_bytes() + 100 * 10**6)
    assert memory.at_once(64, 10 * 10**6) in (8, 9, 10)
    assert memory.at_once(64, 10 * 10**6, reserve=50 * 10**6) in (3, 4, 5)
    assert memory.at_once(4, 10**6) == 4
    assert memory.at_once(64, 10**9) == 1


def test_a_run_that_cannot_fit_is_refused_with_what_would(make_model, tmp_path, small):
    recipe = load_recipe("svd", small)
    with pytest.raises(MemoryLimitError, match=r"memory: \d.* GB are needed.*Give --memory \d+\.\dGB;"):
        Run(recipe, make_model("mixtral"), tmp_path, memory=10**6).run()
    with pytest.raises(MemoryLimitError, match=r"Give --memory \d+\.\dGB, or --workers 1;"):
        Run(recipe, make_model("mixtral"), tmp_path, memory=2 * anonymous_bytes(), workers=8).run()
    assert not list(tmp_path.glob("0*"))


def test_the_command_line_alone_changes_how_its_process_frees_memory(make_model, tmp_path, small, monkeypatch):
    called: list[str] = []
    monkeypatch.setattr("moesvd_quant.memory.allocator._c_library", lambda name, *_: called.append(name))
    Run(load_recipe("svd", small), make_model("mixtral"), tmp_path).run()
    assert "mallopt" not in called
    monkeypatch.setattr("sys.argv", ["moesvd", "ls"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "mallopt" in called


def test_a_limit_does_not_change_the_result(make_model, tmp_path, small, monkeypatch):
    """Everything on disk that can be, one expert at a time."""
    recipe, folder = load_recipe("fit", [*small, "budget=6bpw", "seed=3"]), make_model("qwen3_moe")
    Run(recipe, folder, tmp_path / "a").run()
    monkeypatch.setenv("MOESVD_CACHE", str(tmp_path / "other"))
    tight = Run(recipe, folder, tmp_path / "b")
    tight.statistics.memory = Memory(1)
    monkeypatch.setattr(tight, "needs", lambda: type("", (), {"require": lambda self, cache: None})())
    tight.run()
    for path in sorted((tmp_path / "a").rglob("*")):
        if path.is_file() and path.name not in ("run.json", ".lock"):
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes(), path


def test_nothing_of_a_layer_stays_when_it_is_done(make_model, tmp_path, small):
    """Python's own collector, which counts objects and not their bytes, does not come by here."""
    held: list[int] = []

    def report(what: str, done: int, total: int) -> None:
        if what == "gptq: layers" and done:
            held.append(tensor_bytes())

    folder = make_model("mixtral", num_hidden_layers=4)
    gc.disable()
    try:
        Run(load_recipe("svd-gptq4", small), folder, tmp_path / "out", report=report).run()
    finally:
        gc.enable()
    assert len(held) == 4 and held[3] <= 1.001 * held[1]
