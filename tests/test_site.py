"""The site builds without a warning, and its reference has every key, command and function."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moesvd_quant.recipe.schema import recipe_schema
from moesvd_quant.recipe.stage import STAGES

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.timeout(600)
def test_the_site_builds_without_a_warning(tmp_path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    assert json.loads((site / "reference/recipe.schema.json").read_text()) == recipe_schema()
    page = (site / "reference/recipe/index.html").read_text()
    assert all(f"<code>{key}</code>" in page for stage in STAGES.values() for key in stage.model_fields)
    assert "moesvd compare" in (site / "reference/commands/index.html").read_text()
    assert "RecipeError for all that is wrong" in (site / "reference/python/index.html").read_text()
    assert "Beside other tools" in (site / "index.html").read_text()
    for file in site.rglob("*.html"):  # nothing of the site comes from elsewhere
        content = file.read_text()
        assert not re.search(r'<(script|img|iframe)[^>]* src="(https?:)?//', content), file
        assert not re.search(r'<link[^>]* rel="stylesheet"[^>]* href="(https?:)?//', content), file
        assert 'class="mermaid"' not in content, f"{file}: the theme would load mermaid from the network"
    assert 'href="site.css"' in (site / "index.html").read_text()
    notebook = (site / "notebook/index.html").read_text()
    assert "gptq2: mean" in notebook and "data:image/png;base64," in notebook  # what cells print and draw
