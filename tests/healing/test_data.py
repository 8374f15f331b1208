"""What is trained on: packed, split, rendered, and never what is evaluated on."""

import json

import numpy as np
import pytest
import torch

from moesvd_quant.calibration.rows import TextError
from moesvd_quant.healing.data import NGRAM, ngrams, refuse_leaks, training_windows
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run
from tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def letters(index: int) -> str:
    return f"document {index}: " + " ".join(str(index * 1000 + i) for i in range(40))


@pytest.fixture
def documents(tmp_path):
    file = tmp_path / "docs.jsonl"
    file.write_text("".join(json.dumps({"text": letters(i)}) + "\n" for i in range(20)))
    return file


def test_documents_are_packed_end_to_end_and_held_out_ones_are_not_trained_on(documents, tokenizer):
    made = training_windows(str(documents), tokenizer, 1000, 5, 32, seed=0)
    tokens = sum(len(tokenizer(letters(i) + "\n\n").input_ids) for i in range(20))
    assert len(made.train) + len(made.validation) == tokens // 32 and len(made.validation) == 5
    seen = {tuple(ids) for ids in made.train.tolist()}
    assert not seen & {tuple(ids) for ids in made.validation.tolist()}
    text = tokenizer.decode(made.validation.flatten())
    first = int(text.split(":")[0].split()[-1])
    assert text.startswith(letters(first)[:100])  # held out is the front of the shuffled documents
    again, other = (training_windows(str(documents), tokenizer, 1000, 5, 32, seed) for seed in (0, 1))
    assert again.digest == made.digest != other.digest


def test_too_little_text_is_said(documents, tokenizer):
    with pytest.raises(TextError, match=r"docs\.jsonl: \d+ windows of 32 tokens; 900 are held out.*lora\.validation"):
        training_windows(str(documents), tokenizer, 10, 900, 32, 0)


def test_ngrams_meet_exactly_where_tokens_do():
    first, second = (torch.randint(0, 50, (300,), generator=torch.Generator().manual_seed(s)).numpy() for s in (1, 2))
    second[100 : 100 + NGRAM + 4] = first[30 : 30 + NGRAM + 4]
    assert np.isin(ngrams(second, NGRAM), ngrams(first, NGRAM)).sum() == 5
    assert len(ngrams(first[: NGRAM - 1], NGRAM)) == 0


def test_evaluation_text_is_refused_by_content_and_not_by_name(documents, tmp_path, tokenizer):
    copied, fresh = tmp_path / "another-name.txt", tmp_path / "docs.txt"
    mostly_new = " ".join(f"other {i}" for i in range(1000))
    copied.write_text(mostly_new[:5000] + letters(3) + letters(4) + mostly_new[5000:])
    fresh.write_text(mostly_new)
    made = training_windows(str(documents), tokenizer, 1000, 2, 32, 0)
    refuse_leaks(made, {"fresh": str(fresh)}, tokenizer)
    with pytest.raises(TextError, match=r"\d\.\d% of held \(.*another-name\.txt\) stands in the text that lora trains"):
        refuse_leaks(made, {"fresh": str(fresh), "held": str(copied)}, tokenizer)


def test_a_run_refuses_before_any_work(make_model, tmp_path, small, text):
    (tmp_path / "r.yaml").write_text("stages: [{svd: {ratio: 0.3}}, {lora: {steps: 4, validation: 4}}]")
    recipe = load_recipe(tmp_path / "r.yaml", [*small, f"evaluate.perplexity=[{text}]"])
    with pytest.raises(TextError, match="stands in the text that lora trains on"):
        Run(recipe, make_model("mixtral"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
