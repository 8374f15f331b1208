"""The benchmark's arithmetic, by hand."""

import math

import pytest

from moesvd_quant.evaluation.benchmarks.healing import recovery, spread


def test_recovery_is_measured_against_the_original_that_was_trained_too():
    original, compressed, tuned = {"t": 4.0}, {"t": 5.0}, {"t": 3.8}
    assert recovery(original, compressed, tuned, {"t": 3.8}, "t") == pytest.approx(1.0)
    assert recovery(original, compressed, tuned, {"t": 4.3}, "t") == pytest.approx(0.5)
    assert recovery(original, compressed, tuned, {"t": 4.8}, "t") == pytest.approx(0.0)  # gained what the original did
    worse = {"t": 4.2}  # training hurt the original: that is no credit to healing
    assert recovery(original, compressed, worse, {"t": 4.5}, "t") == pytest.approx(0.5)
    assert spread([math.e, 1.0, 2.0]) == pytest.approx(math.e - 1)
