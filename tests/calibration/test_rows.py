"""What a row of a text file means, in calibration, healing and evaluation alike."""

import json

import pytest

from moesvd_quant.calibration.rows import TextError, texts_of
from moesvd_quant.calibration.text import documents, load_documents
from moesvd_quant.healing.data import training_documents
from tiny import tiny_tokenizer

TALK = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}


@pytest.fixture
def chatty():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    return tokenizer


def texts(*rows, tokenizer=None) -> list[str]:
    return list(texts_of(iter(rows), "f", tokenizer))


def test_every_form_has_one_meaning(chatty):
    assert texts({"text": "plain"}) == ["plain"]
    assert texts(ALPACA) == ["### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3"]
    assert texts(ALPACA | {"input": ""}) == ["### Instruction:\nAdd.\n\n### Response:\n3"]
    assert texts(TALK, tokenizer=chatty) == ["<user>Hi<assistant>Hello"]
    # Columns of other rows are null in a table: they say nothing.
    assert texts({"text": None} | TALK, {"text": "x", "messages": None}, tokenizer=chatty) == [
        "<user>Hi<assistant>Hello",
        "x",
    ]
    assert texts({"text": None}, {"text": ""}, {"messages": None}) == [""]


@pytest.mark.parametrize(
    "row,message",
    [
        ({"text": 5}, r"f, row 2: text is int and not a string: '5'"),
        ({"text": ["a", "b"]}, r"f, row 2: text is list"),
        ({"instruction": "Add.", "output": 3}, r"f, row 2: output is int"),
        ({"question": "?"}, r"f, row 2: has columns question; text, messages, or instruction"),
        ({"messages": [{"role": "user"}]}, r"f, row 2: holds conversations, and .* no chat template"),
    ],
)
def test_what_is_no_text_is_named_by_file_and_row(row, message):
    with pytest.raises(TextError, match=message):
        texts({"text": "x"}, row, tokenizer=tiny_tokenizer())


def test_messages_that_the_template_refuses(chatty):
    chatty.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TextError, match=r"row 1: the chat template .*roles must alternate"):
        texts(TALK, tokenizer=chatty)


def test_calibration_training_and_evaluation_read_the_same(chatty, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in [{"text": "a"}, {"text": None}, TALK]))
    expected = ["a", "<user>Hi<assistant>Hello"]
    assert list(documents(str(file), "train", chatty)) == expected
    assert load_documents(str(file), "test", chatty) == expected
    assert list(training_documents(str(file), chatty)) == expected


def test_a_path_with_commas_is_one_path(tmp_path):
    file = tmp_path / "cal, ü.txt"
    file.write_text("words")
    assert load_documents(str(file)) == ["words"]
