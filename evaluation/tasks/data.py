"""Local files of the seven zero-shot tasks, WikiText-2, HumanEval and MBPP, in the columns that lm-eval's tasks have.

The folder is $MOESVD_TASK_DATA, or `data` of the metadata (`lm_eval run --metadata '{"data": "FOLDER"}'`, `moesvd eval
--task-data FOLDER`). It is searched for the names the data are published under, .gz or not, in sub-folders too.
"""

import gzip
import json
import re

from datasets import Dataset

from moesvd_quant.recipe.tasks import FILES, data_folder, find_file


def _read(folder: str | None, task: str) -> list[str]:
    """Texts of a task's files; FileNotFoundError says what was looked for."""
    root = data_folder(folder)
    if not root:
        raise FileNotFoundError("no folder of task data: set MOESVD_TASK_DATA, or give --task-data FOLDER")
    found = [find_file(root, names) for names in FILES[task]]
    return [(gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes()).decode() for p in found]


def _lines(folder: str | None, task: str) -> list[dict]:
    return [json.loads(line) for line in _read(folder, task)[0].splitlines() if line.strip()]


def _questions(rows: list[dict]) -> Dataset:
    """Layout of AI2: question.stem, question.choices [{text, label}], answerKey."""
    return Dataset.from_list([
        {
            "question": row["question"]["stem"],
            "question_stem": row["question"]["stem"],
            "choices": {key: [c[key] for c in row["question"]["choices"]] for key in ("text", "label")},
            "answerKey": row["answerKey"],
        }
        for row in rows
    ])  # fmt: skip


def openbookqa(data=None, **_) -> dict:
    return {"test": _questions(_lines(data, "openbookqa"))}


def arc_easy(data=None, **_) -> dict:
    return {"test": _questions(_lines(data, "arc_easy"))}


def arc_challenge(data=None, **_) -> dict:
    return {"test": _questions(_lines(data, "arc_challenge"))}


def winogrande(data=None, **_) -> dict:
    return {"validation": Dataset.from_list(_lines(data, "winogrande"))}


def piqa(data=None, **_) -> dict:
    questions, answers = _read(data, "piqa")
    rows = [json.loads(line) for line in questions.splitlines() if line.strip()]
    labels = [int(line) for line in answers.split()]
    if len(rows) != len(labels):
        raise ValueError(f"piqa: {len(rows)} questions and {len(labels)} labels")
    return {"validation": Dataset.from_list([row | {"label": label} for row, label in zip(rows, labels)])}


def mathqa(data=None, **_) -> dict:
    return {"test": Dataset.from_list(json.loads(*_read(data, "mathqa")))}


def hellaswag(data=None, **_) -> dict:
    """The published layout, or one that was cleaned before and whose context is one piece."""
    return {"validation": Dataset.from_list([_split(row) for row in _lines(data, "hellaswag")])}


def _split(row: dict) -> dict:
    """ctx_a and ctx_b of a context: ctx_b is the sentence that the endings go on with, if one was begun."""
    if "ctx_b" not in row:
        begun = re.search(r"(?<=[.?!]) ([^A-Z.?!][^.?!]*)$", row["ctx"])
        row = row | {"ctx_a": row["ctx"][: begun.start()] if begun else row["ctx"], "ctx_b": begun[1] if begun else ""}
    return {key: row[key] for key in ("activity_label", "ctx_a", "ctx_b", "endings")} | {"label": int(row["label"])}


def humaneval(data=None, **_) -> dict:
    return {"test": Dataset.from_list(_lines(data, "humaneval"))}


def mbpp(data=None, **_) -> dict:
    """All 974 problems as they are published, or those of the test alone: its ids are 11 to 510."""
    rows = [row for row in _lines(data, "mbpp") if 11 <= row["task_id"] <= 510]
    keys = ("task_id", "text", "code", "test_list", "test_setup_code")
    return {"test": Dataset.from_list([{key: row[key] for key in keys if key in row} for row in rows])}


def wikitext(data=None, **_) -> dict:
    """Articles of WikiText-2, split where the published document-level version splits: at their titles."""
    pages: list[str] = []
    lines: list[str] = []
    for line in _read(data, "wikitext")[0].split("\n"):
        title = line.replace("= = =", "===").replace("= =", "==").strip()
        if title.startswith("= ") and title.endswith(" ="):
            pages.append("\n".join(lines))
            lines = []
        lines.append(line)
    pages.append("\n".join(lines))
    return {"test": Dataset.from_list([{"page": page} for page in pages if page.strip()])}
