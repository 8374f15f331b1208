"""The ablations are recipes that differ in what their table is about, and print what they measured."""

import json

from moesvd_quant.evaluation.benchmarks.ablations import METRICS, rows_of, run_table
from moesvd_quant.recipe.load import load_recipe


def test_rows_are_the_papers():
    assert len(rows_of(4, 0.2, 8, ["wiki.txt"])) == 4
    five = [options["select"] for options, _ in rows_of(5, 0.2, 8, ["wiki.txt"]).values()]
    assert tuple(five) == METRICS and len(set(five)) == 7
    six = rows_of(6, 0.2, 8, ["wiki.txt"])
    assert [options["trim_u"] for options, _ in six.values()] == list(range(8))
    assert six["6 of 8"] == rows_of(4, 0.2, 8, ["wiki.txt"])["MoE-SVD"]  # runs once for both
    assert list(rows_of(7, 0.2, 8, ["a/wiki.txt,b/books.jsonl.gz", "code"])) == ["wiki+books", "code"]
    assert [text for _, text in rows_of(7, 0.2, 8, ["a/wiki.txt", "b/c4.txt"]).values()] == ["a/wiki.txt", "b/c4.txt"]


def test_a_table_says_what_its_recipes_gave(make_model, text, tmp_path):
    made = run_table(
        7, make_model("mixtral"), tmp_path, {"words": str(text)}, 0.3, 4, [str(text)], 24, 64, "cpu", lambda *_: None
    )
    (original, row), (file,) = made.rows, tmp_path.glob("*.yaml")
    assert load_recipe(file).stages[0].method == "moe_svd"
    assert original[0] == "original" and original[1] == 0 and row[0] == "words"
    assert abs(row[1] - 30) < 1 and row[2] in ("0", "1")
    record = json.loads((tmp_path / file.stem / "01-svd" / "eval.json").read_text())
    assert row[3] == float(f"{record['perplexity']['words']['ppl']:.5g}") > 0
