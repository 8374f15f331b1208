"""The wheel has all it needs: built, installed outside the repository, and used there."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing is left in the repository, and nothing that lies there gets in."""
    tree = tmp_path_factory.mktemp("tree") / "project"
    shutil.copytree(
        ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "site", "*-out", "__pycache__")
    )
    command = [sys.executable, "-m", "pip", "wheel", str(tree), "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", str(tree.parent)], check=True, cwd=tree.parent)
    return next(tree.parent.glob("moesvd_quant-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The scripts of an environment of its own, with the wheel and the libraries of this one, but not our sources."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    packages = next(home.glob("lib*/python*/site-packages"))
    (packages / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(home / "bin/python"), "install", "--no-deps", "-q"]
    subprocess.run([*command, "--ignore-installed", str(wheel)], check=True)
    return home / "bin"


def run(installed: Path, folder: Path, *command: str) -> str:
    """What a command of the environment prints, in a folder where nothing of ours lies."""
    away = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    name, *arguments = command
    done = subprocess.run([str(installed / name), *arguments], cwd=folder, env=away, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_it_holds_what_is_needed_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    needed = [
        "py.typed", "constraints.txt", "recipes/fit.yaml", "recipes/models/mixtral-8x7b.yaml",
        "reference/mixtral-6m/model.safetensors",
        "evaluation/tasks/openbookqa_local.yaml", "evaluation/page.html.jinja", "evaluation/runs.html.jinja",
    ]  # fmt: skip
    assert {f"moesvd_quant/{name}" for name in needed} <= names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "moesvd_quant").rglob("*.py")}
    assert {name for name in sources if "/evaluation/" not in name and "/recipes/" not in name} <= names
    assert not [name for name in names if "benchmarks" in name or name.startswith(("tests", "docs"))]


def test_its_version_is_the_tag(tmp_path):
    """Of git where there is one, else the fallback."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    away = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}

    def said() -> str:
        ask = [sys.executable, "-m", "setuptools_scm"]
        return subprocess.run(ask, cwd=tmp_path, env=away, check=True, capture_output=True, text=True).stdout.strip()

    assert said() == tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools_scm"]["fallback_version"]
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@y"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"], ["tag", "v3.2.1"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    assert said() == "3.2.1"
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "two"], cwd=tmp_path, check=True)
    assert said().startswith("3.2.2.dev1")


def test_it_works_in_an_environment_outside_the_repository(wheel, installed, tmp_path):
    where = "import moesvd_quant; print(moesvd_quant.__file__, moesvd_quant.__version__)"
    assert run(installed, tmp_path, "python", "-c", where).split() == [
        str(next(installed.parent.glob("lib*/python*/site-packages")) / "moesvd_quant/__init__.py"),
        wheel.name.split("-")[1],
    ]
    assert "fit-best" in run(installed, tmp_path, "moesvd", "ls")
    assert "missing" not in run(installed, tmp_path, "moesvd", "doctor")
    small = [
        "calibration.dataset=demo",
        "calibration.samples=8",
        "calibration.length=64",
        "calibration.self_written=0.0",
    ]
    recipe = ["svd-gptq3", "--model", "reference", *small]
    assert "Plan" in run(installed, tmp_path, "moesvd", "plan", *recipe)
    run(installed, tmp_path, "moesvd", "run", *recipe, "--out", "out", "evaluate.perplexity=[]")
    run(installed, tmp_path, "moesvd", "report", "out")
    assert (tmp_path / "out/report.html").is_file()
    use = (
        "import torch, moesvd_quant; m = moesvd_quant.load('out/02-gptq'); "
        "print(m(input_ids=torch.tensor([[1, 2]])).logits.isfinite().all().item())"
    )
    assert run(installed, tmp_path, "python", "-c", use).strip() == "True"
