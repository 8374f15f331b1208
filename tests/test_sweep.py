"""Seeds and calibration sizes: every combination runs, and the table is their mean and spread."""

from statistics import fmean, stdev

from moesvd_quant.evaluation.record import Wanted

from moesvd_quant.sweep import sweep


def test_every_seed_and_size_is_measured_once(make_model, text, tmp_path, small):
    arguments = (make_model("mixtral"), ["svd"], tmp_path, Wanted({"words": str(text)}, length=64), [0, 1], [12, 24])
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
