"""That mypy checks calls across every border of the package, evaluation's too."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_wrong_arguments_to_evaluation_are_seen(tmp_path):
    (tmp_path / "wrong.py").write_text(
        "from moesvd_quant.evaluation.inputs import EvalSpec\nfrom moesvd_quant.evaluation.record import evaluate\n"
        "evaluate(3, {'demo': 'demo'}, 256)\nEvalSpec(7)\n"
    )
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", tmp_path / "wrong.py"],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    ).stdout  # fmt: skip
    assert found.count("[arg-type]") == 4, found
