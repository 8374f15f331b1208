"""The notebook of the docs runs as it stands, and shows what it then prints."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FILE = Path(__file__).resolve().parents[1] / "docs/notebook.ipynb"


def shown(notebook) -> list[str]:
    """What cells printed and showed, but for warnings; of a picture, that there is one."""
    outputs = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if output.get("name") != "stderr"
    ]
    return ["picture" if "image/png" in o.get("data", {}) else o.get("text") or o.data["text/plain"] for o in outputs]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_notebook_says_what_it_computes(tmp_path):
    """Other Pythons have other texts, other processors round otherwise: figures may move, words may not."""
    stored, made = nbformat.read(FILE, 4), nbformat.read(FILE, 4)
    for cell in made.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(made, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    before, now = shown(stored), shown(made)
    assert len(before) == len(now) == 5 and before[3] == now[3] == "picture"
    number = r"\d+(?:\.\d+)?"
    for old, new in zip(before[:4], now[:4]):
        assert re.sub(rf"{number}|\s", "", old) == re.sub(rf"{number}|\s", "", new)
        was, found = ([float(one) for one in re.findall(number, text)] for text in (old, new))
        assert found == pytest.approx(was, rel=0.15, abs=5e-4)  # of divergences; what they tell apart is 15 times
    assert now[4].startswith("The function returns")
