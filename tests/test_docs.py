"""The README is true: its commands run, its table is the demo's, its recipes and links exist."""

import random
import re
import shlex
from pathlib import Path
from pkgutil import resolve_name

import pytest

from moesvd_quant import cli
from moesvd_quant.recipe.recipe import load_recipe, shipped

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def commands():
    block = README.split("## Use")[1].split("```sh\n")[1].split("```")[0]
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines()]


def test_every_command_of_the_readme_runs(make_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    for name, count in (("mine.txt", 350_000), ("held-out.txt", 3000)):
        Path(name).write_text("".join(draw.choices("abc def ghi", k=count)))
    assert len(commands()) == 12
    for command in commands():
        command = [str(make_model("mixtral")) if part == "MODEL" else part for part in command]
        monkeypatch.setattr("sys.argv", ["moesvd", *command])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, (command, capsys.readouterr().err)
    assert (
        Path("out/plot.png").is_file()
        and Path("out/report.html").is_file()
        and Path("plain/model.safetensors.index.json").is_file()
    )


def test_the_functions_of_the_readme_run(make_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("".join(random.Random(0).choices("abc def ghi", k=100_000)))
    code = README.split("with typed results:")[1].split("```python\n")[1].split("```")[0]
    assert code.count("moesvd_quant.") == 4
    model = make_model("mixtral")
    small = {"calibration.samples": 24, "calibration.self_written": 0.0}
    code = code.replace('"reference"', repr(str(model))).replace("options = {", f"options = {small} | {{")
    exec("import moesvd_quant\n" + code, {})
    assert "bits_per_expert_weight" in capsys.readouterr().out


def test_the_recipe_and_every_named_one_are_valid(tmp_path):
    (tmp_path / "mine.yaml").write_text(README.split("```yaml\n")[1].split("```")[0])
    assert [s.name for s in load_recipe(tmp_path / "mine.yaml").stages] == ["svd", "gptq"]
    table = README.split("| recipe |")[1].split("\n\n")[0]
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`([\w-]+)`", row.split("|")[1])}
    assert named == {name for name, _ in shipped() if not name.startswith("models/")}


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_functions_named_in_the_method_notes_exist():
    pages = "".join((ROOT / "docs" / name).read_text() for name in ("moe-svd.md", "d2-moe.md"))
    names = re.findall(r"`((?:decompose|calibration|checkpoint|planning|quantize|stages)[\w.]*\.\w+)`", pages)
    assert len(names) >= 10
    for name in names:
        assert resolve_name(f"moesvd_quant.{name}") is not None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_table_of_the_readme_is_what_the_demo_prints(tmp_path):
    """Other Pythons carry other documentation, other processors round otherwise: the figures may move a little."""
    from moesvd_quant.comparison.demo import run_demo

    written = README.split("<!-- demo table: begin -->\n")[1].split("<!-- demo table: end -->")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in written]
    table = run_demo(tmp_path)[1]
    assert cells[0] == table.columns and len(cells) == len(table.rows) + 2
    for row, said in zip(table.rows, cells[2:]):
        assert row[0] == said[0]
        assert [float(value) for value in row[1:]] == pytest.approx([float(value) for value in said[1:]], rel=0.05)
