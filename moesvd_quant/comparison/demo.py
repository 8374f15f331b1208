"""The main job on the embedded model and text that every Python carries: no network, a few minutes."""

from pathlib import Path

from ..evaluation.table import Table
from ..reference import path as reference_path
from ..run.threads import sync_threads
from .bench import Report, compare

RECIPES = ("gptq4", "gptq3", "gptq2", "svd", "svd-gptq4", "svd-gptq3", "fit", "moe-svd-paper")
CALIBRATION = ("calibration.dataset=demo", "calibration.samples=192", "calibration.length=256")
# Held-out text of the calibrated kind, and text that nothing was calibrated on.
TEXTS = {"demo": "demo", "code, uncalibrated": "demo-code"}


def run_demo(out: Path, report: Report = lambda what, done, total: None) -> tuple[list[dict], Table]:
    """Runs RECIPES under `out` and compares every result with the original; see `compare`."""
    sync_threads()
    return compare(reference_path(), RECIPES, out, TEXTS, 256, CALIBRATION, report=report)
