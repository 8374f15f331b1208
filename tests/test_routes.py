"""Routes to a size: the search for what has to go, and who is best."""

import pytest

from moesvd_quant.comparison.routes import alike, best, by_bits, by_share
from moesvd_quant.errors import MoesvdError

STAGES = lambda share: [{"svd": {"ratio": share}}]  # noqa: E731


def share_of(content: dict) -> float:
    return content["stages"][0]["svd"]["ratio"]


def test_the_least_share_that_reaches_the_bytes():
    exact = by_share("ranks", STAGES, "2bpw", 600, lambda content: round(1000 * (1 - share_of(content))))
    assert exact.stages == STAGES(52 / 128)  # 51/128 leaves 602 bytes, 52/128 leaves 594
    eighths = by_share("drop", STAGES, "2bpw", 600, lambda content: 125 * (8 - int(8 * share_of(content))))
    assert eighths.stages == STAGES(0.5)  # of 8 experts three may go and leave 625 bytes, so four do


def test_what_a_stage_refuses_is_too_much():
    def size(content: dict) -> int:
        if share_of(content) > 0.75:
            raise MoesvdError("two experts have to stay")
        return round(1000 * (1 - share_of(content)))

    assert by_share("drop", STAGES, "2bpw", 300, size).stages == STAGES(90 / 128)
    late = by_share("drop", STAGES, "1bpw", 200, size)
    assert late.stages is None and late.why == "two experts have to stay"


def test_routes_that_do_not_come_to_a_size_say_why():
    size = lambda content: round(1000 - 100 * share_of(content))  # noqa: E731
    assert "bytes at the least, of 500" in by_share("ranks", STAGES, "1bpw", 500, size).why
    assert "nothing has to go" in by_share("ranks", STAGES, "4bpw", 1000, size).why
    bits = [[{"gptq": {"bits": bits}}] for bits in (8, 4, 2)]
    width = lambda content: 100 * content["stages"][0]["gptq"]["bits"]  # noqa: E731
    assert by_bits("grids", bits, "4bpw", 500, width).stages == [{"gptq": {"bits": 4}}]
    assert by_bits("grids", bits, "1bpw", 100, width).why == "200 bytes at the least, of 100"


def record(perplexity: float, divergence: float | None) -> dict:
    more = {} if divergence is None else {"difference": {"mean": divergence}}
    return {"perplexity": {"wiki": {"ppl": perplexity} | more}}


@pytest.mark.parametrize("measured", [True, False])
def test_the_best_route_by_each_measure(measured):
    records = {
        "original": record(9.0, None),
        "fit@2bpw": record(10.0, 0.2 if measured else None),
        "drop+3bit@2bpw": record(9.9, 0.3 if measured else None),
        "fit@1bpw": record(12.0, 0.5 if measured else None),
        "trellis@1bpw": record(11.0, 0.4 if measured else None),
    }
    rows = [tuple(row) for row in best(records, ["2bpw", "1bpw"]).rows]
    assert ("2bpw", "wiki", "perplexity", "drop+3bit", 9.9, "fit", 10.0) in rows
    assert ("1bpw", "wiki", "perplexity", "trellis", 11.0, "fit", 12.0) in rows
    assert (("2bpw", "wiki", "divergence", "fit", 0.2, "drop+3bit", 0.3) in rows) == measured
    assert len(rows) == (4 if measured else 2)


def test_routes_read_the_model_as_the_recipe_does():
    found = alike("fit", ["budget=2bpw", "experts=all", "calibration.samples=24"])
    assert found["balance"] and found["experts"] == "all" and found["calibration"]["samples"] == 24
    assert not {"stages", "budget", "limits"} & found.keys()
