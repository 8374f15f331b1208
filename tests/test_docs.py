"""README and docs are true: commands run as they stand, the table is the demo's, recipes and links exist."""

import random
import re
import shlex
import shutil
from pathlib import Path
from pkgutil import resolve_name

import pytest

from moesvd_quant import cli
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.recipe.shipped import shipped

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: str) -> list[list[str]]:
    """Arguments of every `moesvd` command in the `sh` blocks of a page."""
    lines = [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("moesvd ")]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder, with text to calibrate on and to measure on."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    for name, count in (("mine.txt", 60_000), ("held-out.txt", 3000)):
        Path(name).write_text("".join(draw.choices("abc def ghi", k=count)))
    return tmp_path


def run_all(given: list[list[str]], monkeypatch, capsys) -> str:
    """What the commands print."""
    printed = ""
    for command in given:
        monkeypatch.setattr("sys.argv", ["moesvd", *command])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        assert not stop.value.code, (command, err)
        printed += out
    return printed


@pytest.mark.timeout(900)
def test_every_command_of_the_readme_runs(make_model, folder, monkeypatch, capsys):
    model = str(make_model("mixtral", max_position_embeddings=64))
    given = [
        [model if part == "MODEL" else part for part in command] for command in commands(README.split("## Use")[1])
    ]
    assert len(given) == 6
    run_all(given, monkeypatch, capsys)
    assert Path("out/report.html").is_file() and Path("plain/model.safetensors.index.json").is_file()
    mine, serve = commands(README.split("## Beside")[0])
    assert mine == ["run", "fit", "budget=2.3bpw", "--model", "MODEL", "--out", "out"]  # with text, it is run above
    assert serve == ["serve", "out/02-gptq"] and Path(serve[1], "moesvd.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_of_the_tutorial_runs_as_it_stands(make_model, folder, monkeypatch, capsys):
    shutil.copytree(make_model("qwen3_moe", max_position_embeddings=64), "my-model")
    given = commands((ROOT / "docs/tutorial.md").read_text())
    assert len(given) == 10
    printed = run_all(given, monkeypatch, capsys)
    assert "held-out: divergence from the original" in printed and "every file is the one its manifest names" in printed
    assert all(Path(made).is_file() for made in ("probe/probe.json", "small/report.html", "bytes.png"))
    assert Path("for-others/config.json").is_file()


def test_the_functions_of_the_readme_run(make_model, folder, capsys):
    code = README.split("with typed results:")[1].split("```python\n")[1].split("```")[0]
    assert code.count("moesvd_quant.") == 4
    model = make_model("mixtral")
    small = {"calibration.samples": 24, "calibration.self_written": 0.0}
    code = code.replace('"reference"', repr(str(model))).replace("options = {", f"options = {small} | {{")
    exec("import moesvd_quant\n" + code, {})
    assert "bits_per_expert_weight" in capsys.readouterr().out


def test_the_recipe_and_every_named_one_are_valid(tmp_path):
    page = (ROOT / "docs/recipes.md").read_text()
    (tmp_path / "mine.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    assert [s.name for s in load_recipe(tmp_path / "mine.yaml").stages] == ["svd", "gptq"]
    limited = (ROOT / "docs/howto/budget.md").read_text().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "limited.yaml").write_text(limited)
    assert load_recipe(tmp_path / "limited.yaml").limits.min_bits == {"*.down": 3}
    table = page.split("| recipe |")[1].split("\n\n")[0]
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`([\w-]+)`", row.split("|")[1])}
    assert named == {name for name, _ in shipped() if not name.startswith("models/")}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_files_named_in_code_and_recipes_exist():
    """docs/....md in comments, docstrings and recipes."""
    for path in [
        *(ROOT / "moesvd_quant").rglob("*.py"),
        *(ROOT / "evaluation").rglob("*.py"),
        *(ROOT / "recipes").rglob("*.yaml"),
    ]:
        for named in re.findall(r"docs/[\w/-]+\.md", path.read_text()):
            assert (ROOT / named).is_file(), (path, named)


def test_functions_named_in_the_method_notes_exist():
    pages = "".join((ROOT / "docs" / name).read_text() for name in ("moe-svd.md", "d2-moe.md"))
    names = re.findall(r"`((?:decompose|calibration|checkpoint|planning|quantize|stages)[\w.]*\.\w+)`", pages)
    assert len(names) >= 10
    for name in names:
        assert resolve_name(f"moesvd_quant.{name}") is not None


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_table_of_the_demo_is_what_it_prints(tmp_path):
    """Other Pythons carry other documentation, other processors round otherwise: the figures may move a little."""
    from moesvd_quant.comparison.demo import run_demo

    page = (ROOT / "docs/results/demo.md").read_text()
    written = page.split("<!-- demo table: begin -->\n")[1].split("<!-- demo table: end -->")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in written]
    table = run_demo(tmp_path)[1]
    assert cells[0] == table.columns and len(cells) == len(table.rows) + 2
    for row, said in zip(table.rows, cells[2:]):
        assert row[0] == said[0]
        for head, value, written in zip(table.columns[1:], row[1:], said[1:]):
            some = 0.15 if head.endswith(": divergence") else 0.05  # of what is near zero
            assert written == "-" if value == "-" else float(value) == pytest.approx(float(written), rel=some), head
