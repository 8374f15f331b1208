"""Tasks in which a model writes: lm-eval's names on local files, what it wrote scored, programs only where allowed."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from moesvd_quant import cli, load
from moesvd_quant.evaluation.task_table import task_table
from moesvd_quant.evaluation.tasks import code
from moesvd_quant.evaluation.zero_shot import TaskError, require_tasks, zero_shot
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.recipe.recipe import RecipeError

SUBJECTS = (
    "biology", "business", "chemistry", "computer science", "economics", "engineering", "health", "history", "law",
    "math", "other", "philosophy", "physics", "psychology",
)  # fmt: skip


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sentences(folder):
    """A sentence splitter of nltk's that knows no abbreviations, where local files are."""
    english = folder / "nltk_data/tokenizers/punkt_tab/english"
    english.mkdir(parents=True, exist_ok=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (english / name).write_text("")


@pytest.fixture
def scripted(make_model, monkeypatch):
    """A model that writes what `answers` says, in turn, and keeps the prompts it was given."""
    folder = make_model("mixtral", max_position_embeddings=16384)
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    script = SimpleNamespace(model=model, tokenizer=tokenizer, folder=folder, answers={}, prompts=[])

    def generate(input_ids, attention_mask, **_):
        rows = []
        for ids, seen in zip(input_ids, attention_mask):
            script.prompts.append(tokenizer.decode(ids[seen.bool()]))
            said = next(answer for part, answer in script.answers.items() if script.prompts[-1].rstrip().endswith(part))
            rows.append(torch.cat([ids, torch.tensor(tokenizer(said).input_ids + [0] * 400)[:400]]))
        return torch.stack(rows)

    monkeypatch.setattr(model, "generate", generate)
    return script


def test_gsm8k_reads_local_files_and_scores_what_is_written(scripted, tmp_path):
    train = [{"question": f"example {i}?", "answer": f"so\n#### {i}"} for i in range(6)]
    lines(tmp_path / "gsm8k/main/train.jsonl", train)
    lines(tmp_path / "gsm8k/main/test.jsonl", [{"question": f"sum {i}?", "answer": f"#### {i}"} for i in (4, 7)])
    scripted.answers = {"sum 4?\nAnswer:": " it is\n#### 4", "sum 7?\nAnswer:": " it is 7"}
    found = zero_shot(scripted.model, scripted.tokenizer, ["gsm8k"], str(tmp_path))
    figures = found["tasks"]["gsm8k"]
    assert figures["exact_match,strict-match"] == 0.5 and figures["exact_match,flexible-extract"] == 1
    assert (figures["metric"], figures["correct"]) == ("exact_match,strict-match", "10")
    assert (figures["n"], figures["shots"]) == (2, 5)
    assert all(prompt.count("example ") == 5 for prompt in scripted.prompts)
    table = task_table([{"name": "tiny", "zero_shot": found}])
    assert table.columns[1] == "gsm8k exact_match strict-match" and table.rows[0][1].startswith("50.0 ±")


def test_lm_evals_bars_are_ours_and_nothing_else_is_said(scripted, tmp_path, capfd, monkeypatch):
    lines(tmp_path / "gsm8k/train.jsonl", [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(6)])
    lines(tmp_path / "gsm8k/test.jsonl", [{"question": f"{i}?", "answer": f"#### {i}"} for i in (4, 7)])
    scripted.answers, seen = {"Answer:": " 4"}, []
    monkeypatch.chdir(tmp_path)  # where git would complain
    zero_shot(scripted.model, scripted.tokenizer, ["gsm8k"], str(tmp_path), progress=lambda *given: seen.append(given))
    assert seen[0] == ("tasks: prompts", 0, 2) and seen[-1] == ("tasks: answers written", 2, 2)
    said = capfd.readouterr()
    assert said.out + said.err == ""


def test_a_group_has_the_figures_of_all_its_tasks(scripted, tmp_path):
    rows = [
        {"question": f"{subject}?", "options": ["yes", "no"], "answer": "AB"[i % 2], "category": subject}
        | {"cot_content": "A: Let's think step by step. The answer is (A)."}
        for i, subject in enumerate(SUBJECTS)
    ]
    lines(tmp_path / "MMLU-Pro/test.jsonl", rows)
    lines(tmp_path / "MMLU-Pro/validation.jsonl", 5 * rows)
    scripted.answers = {"Let's think step by step.": " The answer is (B)."}
    figures = zero_shot(scripted.model, scripted.tokenizer, ["mmlu_pro"], str(tmp_path))["tasks"]["mmlu_pro"]
    assert figures["exact_match,custom-extract"] == 0.5 and figures["n"] == 14
    assert figures["correct"].count("1") == 7 and figures["metric"] == "exact_match,custom-extract"


def test_programs_run_where_it_is_allowed(scripted, tmp_path):
    tests = "def check(candidate):\n    assert candidate(2) == 4\n"
    rows = [
        {"task_id": f"HumanEval/{i}", "prompt": f"def {name}(x):\n", "test": tests, "entry_point": name}
        for i, name in enumerate(("double", "triple", "leave"))
    ]
    lines(tmp_path / "HumanEval.jsonl", rows)
    scripted.answers = {
        "def double(x):": "    return 2 * x\n", "def triple(x):": "    return 3 * x\n",
        "def leave(x):": "    import os\n    os._exit(0)\n",
    }  # fmt: skip
    with pytest.raises(TaskError, match=r"humaneval: runs programs that the model writes.*--run-code"):
        zero_shot(scripted.model, scripted.tokenizer, ["humaneval"], str(tmp_path))
    assert not scripted.prompts
    found = zero_shot(scripted.model, scripted.tokenizer, ["humaneval"], str(tmp_path), run_code=True)["tasks"]
    assert found["humaneval"]["pass@1,create_test"] == pytest.approx(1 / 3)
    assert (found["humaneval"]["metric"], found["humaneval"]["correct"]) == ("pass@1,create_test", "100")


def test_mbpp_scores_programs_of_its_test_alone(scripted, tmp_path):
    rows = [
        {"task_id": i, "text": f"task {i}", "code": "", "test_list": [f"assert f({n}) == 4" for n in (4, 4, 4)]}
        for i in (10, 11, 12)
    ]
    lines(tmp_path / "mbpp.jsonl", rows)
    scripted.answers = {"[BEGIN]": "def f(x):\n    return x\n"}
    figures = zero_shot(scripted.model, scripted.tokenizer, ["mbpp"], str(tmp_path), run_code=True)["tasks"]["mbpp"]
    assert figures["n"] == 2 and figures["pass_at_1"] == 1  # 10 is of the prompts
    assert all("similar elements" in prompt for prompt in scripted.prompts)


def test_a_program_that_does_not_end_or_leaves_early_has_not_passed(monkeypatch):
    monkeypatch.setattr(code, "SECONDS", 1.0)
    assert code.passes("print('x')") and not code.passes("assert False")
    assert not code.passes("while True: pass") and not code.passes("import sys; sys.exit()")


def test_other_tasks_that_run_programs_are_known_from_lm_eval(scripted):
    with pytest.raises(TaskError, match="humaneval_plus: runs programs"):
        zero_shot(scripted.model, scripted.tokenizer, ["humaneval_plus"])
    with pytest.raises(RecipeError, match=r"evaluate.run_code: .*humaneval: runs programs"):
        load_recipe("svd", ["evaluate.tasks=humaneval"])
    assert load_recipe("svd", ["evaluate.tasks=humaneval", "evaluate.run_code=true"]).evaluate.wanted_tasks().run_code


def test_what_is_missing_is_said_before_work(scripted, tmp_path, make_model):
    lines(tmp_path / "gsm8k/test.jsonl", [{"question": "?", "answer": "#### 1"}])
    with pytest.raises(TaskError, match=r"gsm8k: has no train.jsonl"):
        zero_shot(scripted.model, scripted.tokenizer, ["gsm8k"], str(tmp_path))
    short = load(make_model("mixtral"))
    with pytest.raises(TaskError, match="niah_single_1: has prompts of 4096 tokens, and the model takes 256"):
        zero_shot(short, scripted.tokenizer, ["niah_single_1"])
    lines(tmp_path / "IFEval/train.jsonl", [])
    sentences(tmp_path)
    with pytest.raises(TaskError, match="ifeval: has the model write 1280 tokens, and the model takes 256 in all"):
        zero_shot(short, scripted.tokenizer, ["ifeval"], str(tmp_path))


def test_what_tasks_need_beside_lm_eval_is_said_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr("nltk.data.path", [])
    monkeypatch.setattr("nltk.download", lambda *given, **named: False)
    for task in ("ifeval", "niah_single_2", "ruler"):
        with pytest.raises(TaskError, match=f"needs nltk's sentence splitter.*{tmp_path}/nltk_data/tokenizers/punkt_"):
            require_tasks([task], str(tmp_path))
    require_tasks(["niah_single_1", "ruler_vt"], str(tmp_path))  # they have no sentences
    sentences(tmp_path)
    require_tasks(["ruler"], str(tmp_path))
    monkeypatch.setattr("moesvd_quant.evaluation.task_needs.find_spec", lambda package: None)
    with pytest.raises(TaskError, match=r"ifeval: needs nltk, langdetect, immutabledict; pip install .*\[tasks\]"):
        require_tasks(["ifeval"], str(tmp_path))


def test_ifeval_reads_local_files_and_checks_each_instruction(scripted, tmp_path, monkeypatch):
    monkeypatch.setattr("nltk.data.path", [])
    sentences(tmp_path)
    wanted = [
        ("punctuation:no_comma", {}),
        ("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 3}),
    ]
    rows = [
        {
            "key": i,
            "prompt": f"say {i}",
            "instruction_id_list": [name for name, _ in wanted],
            "kwargs": [k for _, k in wanted],
        }
        for i in range(2)
    ]
    lines(tmp_path / "IFEval/train.jsonl", rows)
    scripted.answers = {"say 0": "One sentence. Another one.", "say 1": "One, with a comma. Two. Three."}
    figures = zero_shot(scripted.model, scripted.tokenizer, ["ifeval"], str(tmp_path))["tasks"]["ifeval"]
    assert (figures["n"], figures["metric"], figures["correct"]) == (2, "prompt_level_strict_acc", "10")
    assert figures["inst_level_strict_acc"] == 0.5


@pytest.mark.slow  # each task makes 500 prompts of 4096 tokens, whatever the limit
def test_ruler_hides_needles_in_local_essays_and_questions_in_local_files(scripted, tmp_path, monkeypatch, capsys):
    """The needle is in the prompt, within the text that the folder has; an answer that repeats it is right."""
    monkeypatch.setattr("nltk.data.path", [])
    sentences(tmp_path)
    lines(tmp_path / "paul_graham_essays/train.jsonl", [{"text": "A sentence of an essay. " * 900}])
    paragraphs = [
        {
            "context": f"fact {i}. " * 40,
            "qas": [
                {"question": f"which fact is {i}?", "answers": [{"text": f"fact {i}"}], "is_impossible": False}
                for _ in range(20)
            ],
        }
        for i in range(30)
    ]
    (tmp_path / "dev-v2.0.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    scripted.answers = {"provided text is": " 0", "Answer:": " fact 1 fact 2 fact 3"}
    found = zero_shot(scripted.model, scripted.tokenizer, ["niah_single_2", "ruler_qa_squad"], str(tmp_path), limit=2)
    assert not capsys.readouterr().out  # where --json writes
    needle, other, question, _ = scripted.prompts
    assert "A sentence of an essay." in needle and "One of the special magic numbers for" in needle
    assert needle != other and "which fact is 0?" in question and "fact 0. fact 0." in question
    assert found["tasks"]["niah_single_2"]["metric"] == "4096" and found["tasks"]["niah_single_2"]["n"] == 2


def test_the_verb_evaluates_a_task_by_its_name(make_model, tmp_path, monkeypatch, capsys):
    """With what the model itself writes, by transformers: a tiny one says nothing that is right."""
    folder = make_model("mixtral", max_position_embeddings=4096)
    lines(tmp_path / "gsm8k/train.jsonl", [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(6)])
    lines(tmp_path / "gsm8k/test.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}])
    options = ["--tasks", "gsm8k", "--task-data", str(tmp_path), "--out", str(tmp_path / "records"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["moesvd", "eval", str(folder), *options])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert "gsm8k" in capsys.readouterr().out
    [record] = (json.loads(path.read_text()) for path in tmp_path.glob("records/*/eval.json"))
    assert record["zero_shot"]["tasks"]["gsm8k"]["n"] == 1
