"""Local text in every form, windows of it, and what is said where it does not serve."""

import gzip
import json
import socket

import pytest

from moesvd_quant.calibration import text as module
from moesvd_quant.calibration.rows import TextError
from moesvd_quant.calibration.text import calibration_windows, load_documents, token_windows
from tiny import tiny_tokenizer

TEXTS = ["first line\nsecond line", "another text"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_every_local_form_gives_the_same_documents(tmp_path):
    from datasets import Dataset

    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        assert load_documents(str(tmp_path / name)) == TEXTS
    folder = tmp_path / "plain"
    folder.mkdir()
    for index, text in enumerate(TEXTS):
        (folder / f"{index}.txt").write_text(text)
    assert load_documents(str(folder)) == TEXTS
    assert load_documents(f"{tmp_path / 'a.jsonl'}, {folder}") == TEXTS * 2


def test_windows_are_the_text_without_its_short_end(tokenizer):
    windows = token_windows(TEXTS, tokenizer, 10)  # 36 characters
    assert windows.shape == (3, 10)
    assert tokenizer.decode(windows.flatten()) == "\n\n".join(TEXTS)[:30]


def test_calibration_is_drawn_by_seed_in_equal_shares(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("a" * 5000)
    (tmp_path / "b.txt").write_text("b" * 5000)
    source = f"{tmp_path / 'a.txt'},{tmp_path / 'b.txt'}"
    first = calibration_windows(source, tokenizer, 10, 32, seed=1)
    assert first.shape == (10, 32)
    assert (first == calibration_windows(source, tokenizer, 10, 32, seed=1)).all()
    assert sum("a" in tokenizer.decode(window) for window in first) == 5


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("short.txt", "few", r"3 tokens.*one window needs 64"),
        ("wrong.jsonl", '{"body": "x"}\n', r"wrong\.jsonl, row 1: has columns body; text, messages"),
        ("broken.jsonl", "{no json\n", r"broken\.jsonl: cannot be read"),
        ("picture.png", "x", r"picture\.png: not a text file"),
    ],
)
def test_bad_text_is_said(tokenizer, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(TextError, match=message):
        token_windows(load_documents(str(tmp_path / name)), tokenizer, 64)


def test_unknown_names_and_empty_folders(tokenizer, tmp_path):
    with pytest.raises(TextError, match="no such file or folder, and no known text"):
        load_documents("wikitext3")
    with pytest.raises(TextError, match="no text files in this folder"):
        load_documents(str(tmp_path))
    (tmp_path / "x.txt").write_text("word " * 100)
    with pytest.raises(TextError, match=r"fewer calibration\.samples"):
        calibration_windows(str(tmp_path / "x.txt"), tokenizer, 50, 64, seed=0)


def test_demo_text_is_split_and_needs_no_network(tokenizer):
    train, test = load_documents("demo", "train"), load_documents("demo", "test")
    assert sum(map(len, train)) > 400_000 and sum(map(len, test)) > 50_000  # documentation of Python's version
    assert not set(train) & set(test)


def test_without_network_a_text_of_the_hub_is_refused_at_once(monkeypatch):
    """The hub's own client asks six times first: half a minute."""

    def unknown(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(module, "getproxies", dict)
    with pytest.raises(TextError, match=r"wikitext2: is read from .*, which cannot be reached \(.*give a local file"):
        load_documents("wikitext2")
    monkeypatch.setattr(module, "getproxies", lambda: {"https": "http://proxy"})
    module._require_address("wikitext2")  # the proxy knows it
