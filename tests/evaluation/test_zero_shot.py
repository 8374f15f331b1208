"""The seven tasks: lm-eval's own prompts on local files, lm-eval's own scores."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import AutoTokenizer

from moesvd_quant import compress, load
from moesvd_quant.evaluation.report import write_report
from moesvd_quant.evaluation.task_table import task_table
from moesvd_quant.evaluation.zero_shot import FOLDER, LOCAL, TaskError, zero_shot
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.recipe.recipe import RecipeError
from moesvd_quant.recipe.tasks import SEVEN, running_code, task_names

PROMPTS = ("output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "process_docs", "process_results")


def ai2(stem, texts, labels, key):
    choices = [{"text": text, "label": label} for text, label in zip(texts, labels)]
    return {"id": stem, "question": {"stem": stem, "choices": choices}, "answerKey": key}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few questions of each task in the published layouts, some of them compressed."""
    root = tmp_path_factory.mktemp("tasks")
    lines = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)  # noqa: E731
    goals = [{"goal": f"goal {i}", "sol1": "do ab", "sol2": "do not cd"} for i in range(3)]
    math = {"Problem": "2 + 2 ?", "options": "a ) 1 , b ) 2 , c ) 4 , d ) 5 , e ) none", "correct": "c"}
    files = {
        "openbookqa/test.jsonl": lines([ai2("The sky is", ["blue", "red", "green", "old"], "ABCD", "A")]),
        "arc/ARC-Easy-Test.jsonl": lines([ai2("One and one", ["two", "three", "four"], "ABC", "B")]),
        "arc/ARC-Challenge-Test.jsonl": lines([ai2("Which is it?", ["w", "x", "y", "z"], "1234", "3")]),
        "winogrande/dev.jsonl": lines([{"sentence": "A _ soon.", "option1": "it", "option2": "us", "answer": "2"}]),
        "hellaswag/val.jsonl": lines([
            {"activity_label": "Roof", "ctx": "A man sits. he", "label": 3, "endings": ["a", "b", "c", "d"]},
            {"activity_label": "Wiki", "ctx": "Do this. Then", "label": 0, "endings": ["a", "b", "c", "d"]},
        ]),
        "piqa/valid.jsonl": lines(goals),
        "piqa/valid-labels.lst": "0\n1\n1\n",
        "mathqa/test.json": json.dumps([math]),
        "wiki.test.raw": " \n = First = \n \n text one \n = = Part = = \n more \n = Second = \n \n text two \n",
    }  # fmt: skip
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        if "ARC" in name:
            Path(f"{path}.gz").write_bytes(gzip.compress(content.encode()))
        else:
            path.write_text(content)
    return root


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    """It reads thousands of files."""
    return TaskManager()


# Those that ask, whose files are at hand; the others have the model write.
ASKING = [name for name in LOCAL if name in (*SEVEN, "wikitext")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "task", [task for task in LOCAL if not running_code([task])]
)  # the others load metrics of the hub
def test_prompts_are_those_of_lm_eval(manager, task):
    theirs = load_yaml(manager.task_index[task].yaml_path)
    ours = load_yaml(FOLDER / f"{task}_local.yaml")
    for key in PROMPTS:
        mine, other = ours.get(key), theirs.get(key)
        if callable(mine):
            assert (mine.__module__.split(".")[-1], mine.__name__) == (other.__module__.split(".")[-1], other.__name__)
        else:
            assert mine == other, key
    assert [m["metric"] for m in ours["metric_list"]] == [m["metric"] for m in theirs["metric_list"]]


@pytest.mark.slow
def test_local_layouts_become_the_questions_they_are(data):
    manager = TaskManager(include_path=str(FOLDER), metadata={"data": str(data)})
    tasks = manager.load([f"{name}_local" for name in ASKING])["tasks"]
    asked = {}
    for name in ASKING:
        task = tasks[f"{name}_local"]
        docs = list(task.eval_docs)
        asked[name] = [(task.doc_to_text(d), task.doc_to_target(d), d) for d in docs]
    assert asked["openbookqa"][0][:2] == ("The sky is", 0)
    assert asked["arc_easy"][0][:2] == ("Question: One and one\nAnswer:", 1)
    assert asked["arc_challenge"][0][1] == 2  # the key 3 among the labels 1 to 4
    assert asked["winogrande"][0][:2] == (1, "soon.")
    assert asked["piqa"][2][:2] == ("Question: goal 2\nAnswer:", 1)
    assert asked["mathqa"][0][:2] == ("Question: 2 + 2 ?\nAnswer:", 2)
    assert [text for text, *_ in asked["hellaswag"]] == ["Roof: A man sits. He", "Wiki: Do this. Then"]
    assert [d["page"] for *_, d in asked["wikitext"]] == [
        " = First = \n \n text one \n = = Part = = \n more ", " = Second = \n \n text two \n"
    ]  # fmt: skip


def test_the_score_is_the_share_of_questions_whose_answer_is_likeliest(make_model, data):
    """PIQA by hand: log likelihood of each solution after the goal."""
    folder = make_model("mixtral")
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    found = zero_shot(model, tokenizer, ["piqa", "zero-shot"], str(data), limit=3, batch_size=2)

    @torch.no_grad()
    def likelihood(question, answer):
        start = tokenizer(question).input_ids
        ids = torch.tensor(start + tokenizer(answer, add_special_tokens=False).input_ids)
        logs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        return float(logs.gather(1, ids[1:, None])[len(start) - 1 :].sum())

    correct = ""
    for i, label in enumerate((0, 1, 1)):
        scores = [likelihood(f"Question: goal {i}\nAnswer:", f" {s}") for s in ("do ab", "do not cd")]
        correct += str(int(scores.index(max(scores)) == label))
    assert found["tasks"]["piqa"]["correct"] == correct
    assert found["tasks"]["piqa"]["acc"] == correct.count("1") / 3 and found["tasks"]["piqa"]["n"] == 3
    assert list(found["tasks"]) == ["piqa", *[name for name in SEVEN if name != "piqa"]]
    assert found["mean"] == pytest.approx(sum(f["acc"] for f in found["tasks"].values()) / 7)


def test_what_cannot_be_asked_is_said(make_model, tmp_path):
    assert task_names(["zero-shot", "piqa", "lambada"]) == [*SEVEN, "lambada"]
    folder = make_model("mixtral")
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    with pytest.raises(TaskError, match="openbook: no task of lm-eval"):
        zero_shot(model, tokenizer, ["openbook"], str(tmp_path))
    with pytest.raises(TaskError, match=r"has none of piqa/valid.jsonl"):
        zero_shot(model, tokenizer, ["piqa"], str(tmp_path))


def test_a_recipe_measures_tasks_of_the_original_and_of_every_checkpoint(make_model, data, tmp_path, text):
    """And again costs nothing: what was measured is read."""
    calibration = {"dataset": str(text), "samples": 24, "length": 64}
    evaluate = {"tasks": ["piqa", "arc_easy"], "task_data": str(data)}
    recipe = {"calibration": calibration, "stages": [{"gptq": {"bits": 4}}], "evaluate": evaluate}
    model = make_model("mixtral")
    made = compress(model, recipe, tmp_path / "out", device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(model)
    for one, folder in zip(made.evaluation, (model, made.folder), strict=True):
        alone = zero_shot(load(folder).float(), tokenizer, ["piqa", "arc_easy"], str(data))["tasks"]
        assert one.accuracy == {name: alone[name]["acc"] for name in ("piqa", "arc_easy")}
    (_, *cells), _ = task_table([one.record for one in made.evaluation]).rows
    share, n = made.evaluation[0].accuracy["piqa"], 3
    by_hand = (share * (1 - share) / (n - 1)) ** 0.5  # of a sample of zeros and ones
    assert cells[0] == f"{100 * share:.1f} ± {100 * by_hand:.1f}"
    write_report(tmp_path / "out", tmp_path / "report.html")
    assert cells[0] in (tmp_path / "report.html").read_text()
    file = made.folder / "eval.json"
    before = file.stat().st_mtime_ns
    compress(model, recipe, tmp_path / "out", device="cpu")
    assert file.stat().st_mtime_ns == before
    limited = recipe | {"evaluate": evaluate | {"limit": 1}}
    compress(model, limited, tmp_path / "out", device="cpu")
    assert json.loads(file.read_text())["zero_shot"]["tasks"]["piqa"]["n"] == 1


@pytest.mark.parametrize(
    "lines,message",
    [
        ("evaluate:\n  tasks: openbook", "mine.yaml:3: evaluate.tasks: openbook: no task of lm-eval"),
        ("evaluate:\n  tasks: [piqa]\n  task_data: DATA/arc", r"mine.yaml:4: evaluate.task_data: .*none of piqa/valid"),
        ("evaluate:\n  task_data: DATA", "mine.yaml:3: evaluate.task_data: only with tasks"),
        ("evaluate: {limit: 3}", "mine.yaml:2: evaluate.limit: only with tasks"),
    ],
)
def test_a_recipe_says_which_line_asks_for_what_there_is_not(data, tmp_path, lines, message):
    file = tmp_path / "mine.yaml"
    file.write_text("stages: [{svd: {ratio: 0.4}}]\n" + lines.replace("DATA", str(data)))
    with pytest.raises(RecipeError, match=message):
        load_recipe(file)


def test_an_override_that_asks_for_a_file_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MOESVD_TASK_DATA", str(tmp_path))  # the folder that holds where none is given
    with pytest.raises(RecipeError, match=r"has none of openbookqa/test.jsonl"):
        load_recipe("svd", ["evaluate.tasks=zero-shot"])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_lm_evals_own_command_line_gives_the_same_scores(shared, make_model, tmp_path, text):
    """A factorized and quantized checkpoint, opened by lm-eval with remote code."""
    from moesvd_quant.model.named import resolve_model
    from moesvd_quant.recipe.load import load_recipe
    from moesvd_quant.run.run import Run

    small = [f"calibration.dataset={text}", "calibration.samples=16", "calibration.length=64", "evaluate.perplexity=[]"]
    checkpoint = Run(load_recipe("svd-gptq3", small), resolve_model("reference"), tmp_path / "run").run()[-1]
    root, limit = shared / "data/eval", 6
    found = zero_shot(
        load(checkpoint).float(),
        AutoTokenizer.from_pretrained(checkpoint),
        ["zero-shot", "wikitext"],
        str(root),
        limit,
        8,
    )["tasks"]
    done = subprocess.run(
        [
            sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "8",
            "--model_args", f"pretrained={checkpoint},trust_remote_code=True,dtype=float32",
            "--tasks", *[f"{name}_local" for name in ASKING], "--include_path", str(FOLDER),
            "--limit", str(limit), "--output_path", str(tmp_path / "theirs"),
        ],
        capture_output=True, text=True, env=dict(os.environ, MOESVD_TASK_DATA=str(root)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(written.read_text())["results"]
    for name in ASKING:
        for metric in {"acc", "acc_norm", "word_perplexity", "byte_perplexity"} & set(found[name]):
            assert found[name][metric] == pytest.approx(theirs[f"{name}_local"][f"{metric},none"], rel=1e-5), name
