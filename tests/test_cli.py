"""The command line as a user meets it."""

import json
import subprocess
import sys

import pytest

from moesvd_quant import cli


@pytest.fixture
def call(capsys, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["moesvd", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_help_answers_at_once():
    """What makes help slow is loading these; how fast it is without them is the machine's."""
    command = [sys.executable, "-X", "importtime", "-m", "moesvd_quant.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in loaded and not loaded & {"torch", "transformers", "numpy", "peft", "datasets"}
    for verb in ("run", "plan", "validate", "ls", "cp", "eval", "table", "speed", "report", "export", "demo"):
        assert f" {verb} " in done.stdout


def test_ls_cp_validate(call, tmp_path):
    code, out, _ = call("ls", "--json")
    assert code == 0 and "svd-gptq3" in json.loads(out)
    target = tmp_path / "mine.yaml"
    assert call("cp", "svd-gptq3", target)[0] == 0
    assert call("validate", target)[:2] == (0, f"{target}: valid; stages: svd -> gptq\n")
    code, _, err = call("cp", "svd-gptq3", target)
    assert code == 1 and "exists" in err


def test_plan_run_eval_table_export(call, make_model, tmp_path, small, text):
    model, out = make_model("mixtral"), tmp_path / "out"
    small = [*small[:3], f"evaluate.perplexity=[{text}]", "evaluate.length=64"]
    where = ("--model", model, "--out", out, "--json")
    code, said, _ = call("plan", "svd-gptq4", *small, *where)
    forecast = json.loads(said)
    assert code == 0 and not out.exists()
    code, said, err = call("run", "svd-gptq4", *small, *where)
    assert code == 0, err
    result = json.loads(said)
    assert result["checkpoints"] == [str(out / "01-svd"), str(out / "02-gptq")]
    assert [r["name"] for r in result["evaluation"]] == ["original", "svd40", "svd40-gptq4"]
    size = sum(p.stat().st_size for p in (out / "02-gptq").glob("*.safetensors"))
    assert size == pytest.approx(forecast[1]["accounting"]["disk_bytes"], rel=0.01)
    assert call("validate", out / "02-gptq")[0] == 0
    code, said, _ = call("eval", out / "02-gptq", "--text", f"words={text}", "--length", 64, "--json")
    assert json.loads(said)[0]["perplexity"]["words"]["ppl"] == pytest.approx(
        result["evaluation"][2]["perplexity"]["words"]["ppl"]
    )
    code, said, _ = call("table", 8, out, "--format", "csv", "--plot", tmp_path / "p.png")
    assert code == 0 and len(said.splitlines()) == 4 and (tmp_path / "p.png").is_file()
    assert call("export", out / "02-gptq", "--out", tmp_path / "dense", "--to", "dense")[0] == 0
    code, said, _ = call("eval", tmp_path / "dense", "--text", f"words={text}", "--length", 64, "--json")
    assert json.loads(said)[0]["perplexity"]["words"]["ppl"] == pytest.approx(
        result["evaluation"][2]["perplexity"]["words"]["ppl"], rel=1e-3
    )


def test_plan_is_a_table_and_a_map_at_80_columns(call, make_model, tmp_path, small, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["plan", "svd-gptq4", *small, "--model", make_model("mixtral"), "--out", tmp_path / "out"]
    code, said, err = call(*arguments, "--plot", tmp_path / "map.png")
    assert code == 0 and (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG"), err
    forecast = json.loads(call(*arguments, "--json")[1])
    lines = said.splitlines()
    assert max(map(len, lines)) <= 80
    for one in forecast:
        row = next(line.split() for line in lines if line.startswith(one["stage"]))
        assert float(row[1]) == pytest.approx(one["accounting"]["disk_bytes"] / 1e6, abs=0.006)
    at = lines.index("What gptq leaves of the experts:")
    means = [float(line.split()[-1]) for line in lines[at + 1 : at + 3]]
    assert sum(means) / 2 == pytest.approx(forecast[-1]["accounting"]["bits_per_expert_weight"], abs=0.006)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["run", "svd-gtpq4", "--model", "."], "did you mean 'svd-gptq4'"),
        (["run", "svd", "svd.ratio=1.7", "--model", "."], "svd.ratio: 1.7 is not between 0 and 1"),
        (["run", "svd", "--model", "/nowhere/at/all"], "/nowhere/at/all: no such folder"),
        (["run", "svd"], "no model: give --model FOLDER"),
        (["eval", "/nowhere"], "/nowhere: no such folder"),
        (["table", "7", "."], "table 7: is none of 2, 8, 11, 12"),
        (["validate", "/tmp"], "no moesvd.json"),
    ],
)
def test_what_a_user_can_mend_is_one_message(call, arguments, message):
    code, out, err = call(*arguments)
    assert code == 1 and not out and err.startswith("error: ") and message in err
    assert "Traceback" not in err


def test_a_wrong_flag_is_a_usage_error(call):
    code, _, err = call("run", "--modle", "x")
    assert code == 2 and "--modle" in err


def test_without_network_a_hub_name_is_said(call, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = call("run", "svd", "--model", "someone/some-model")
    assert code == 1 and "someone/some-model: no such folder, and it cannot be had from the hub" in err


def test_a_defect_ends_with_a_traceback_and_a_request_to_report_it(call, monkeypatch):
    import torch

    def shapes_that_do_not_fit():
        return torch.ones(2, 3) @ torch.ones(2, 3)

    monkeypatch.setattr("moesvd_quant.recipe.shipped.shipped", shapes_that_do_not_fit)
    code, _, err = call("ls")
    assert code == 1 and "mat1 and mat2 shapes" in err
    assert "Traceback" in err and "shapes_that_do_not_fit" in err and "defect of moesvd_quant" in err


@pytest.mark.parametrize("before", [True, False])
def test_debug_shows_where_an_error_of_the_user_arose(call, before):
    given = ["--debug", "validate", "no-such"] if before else ["validate", "no-such", "--debug"]
    code, _, err = call(*given)
    assert code == 1 and "Traceback" in err and "RecipeError" in err
    code, _, err = call("validate", "no-such")
    assert code == 1 and "Traceback" not in err and err.startswith("error: no-such: no such recipe")


def test_errors_of_the_system_that_a_user_can_mend_are_one_line(call, tmp_path):
    code, _, err = call("cp", "svd-gptq3", tmp_path / "missing" / "mine.yaml")
    assert code == 1 and err.startswith("error: ") and "Traceback" not in err
    code, _, err = call("eval", tmp_path, "--device", "nonsense")
    assert code == 1 and "Traceback" not in err
