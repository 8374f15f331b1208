"""Seeds and calibration sizes: every combination runs, and the table is their mean and spread."""

from statistics import fmean, stdev

import pytest

from moesvd_quant.comparison.bench import compare
from moesvd_quant.comparison.sweep import sweep
from moesvd_quant.errors import UsageError
from moesvd_quant.evaluation.inputs import EvalSpec


def test_every_seed_and_size_is_measured_once(make_model, page, tmp_path, small):
    arguments = (make_model("mixtral"), ["svd"], tmp_path, EvalSpec({"words": str(page)}, length=64), [0, 1], [12, 24])
    records, table = sweep(*arguments, small)
    swept = [(r["sweep"]["samples"], r["sweep"]["seed"]) for r in records if "sweep" in r]
    assert swept == [(12, 0), (12, 1), (24, 0), (24, 1)]
    assert [row[:3] for row in table.rows] == [["original", "-", 1], ["svd40", 12, 2], ["svd40", 24, 2]]
    values = [r["perplexity"]["words"]["ppl"] for r in records[1:3]]
    assert values[0] != values[1]  # a seed chooses other windows
    assert table.rows[1][3] == f"{fmean(values):.5g} ± {stdev(values):.2g} ({min(values):.5g} to {max(values):.5g})"
    assert {p.name for p in tmp_path.glob("*.*")} == {
        "table12.md", "table12.csv", "table12.json", "perplexity-against-samples.png"
    }  # fmt: skip
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert sweep(*arguments, small)[1] == table
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}  # nothing was done again


def test_recipes_that_differ_in_options_are_rows_of_their_own(make_model, page, tmp_path, small):
    for name, size in (("small-groups", 16), ("large-groups", 32)):
        (tmp_path / f"{name}.yaml").write_text(f"stages: [{{gptq: {{bits: 3, group_size: {size}}}}}]")
    files = [str(tmp_path / f"{name}.yaml") for name in ("small-groups", "large-groups")]
    wanted = EvalSpec({"words": str(page)}, length=64)
    _, table = sweep(make_model("mixtral"), files, tmp_path / "out", wanted, [0, 1], [12], small)
    assert [row[:3] for row in table.rows[1:]] == [["gptq3 (small-groups)", 12, 2], ["gptq3 (large-groups)", 12, 2]]


def test_recipes_that_would_write_into_one_folder_are_refused(make_model, text, tmp_path, small):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.yaml").write_text("stages: [{gptq: {bits: 3}}]")
    files = [str(tmp_path / folder / "x.yaml") for folder in ("a", "b")]
    with pytest.raises(UsageError, match=r"a/x\.yaml and .*b/x\.yaml: both would write into x"):
        sweep(make_model("mixtral"), files, tmp_path / "out", EvalSpec({}), [0], [12], small)
    with pytest.raises(UsageError, match="both would write into x"):
        compare(make_model("mixtral"), files, tmp_path / "out", {}, 64, small)
