"""Kinds of tokens, by the text that they stand for: the same for every tokenizer."""

import unicodedata
from itertools import pairwise, takewhile
from typing import Any

import torch

# In the order of `_kind`. A token is of the first that fits.
OTHER, SPACE, WORD, REST, NUMBER, SIGN = KINDS = (
    "other scripts", "white space", "words", "rest of a word", "numbers", "punctuation"
)  # fmt: skip


def kinds(windows: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """The kind of each token that windows (n, length) predict, as places in KINDS: (n, length - 1), int64.

    What a token stands for is what it adds to the text of the token before: tokenizers that leave out the space in
    front of a text then show it, too.

    - other scripts: letters that are not Latin, and tokens that are a part of a character;
    - white space: nothing else;
    - words: Latin letters that begin a word;
    - rest of a word: Latin letters that stand right behind a letter or digit of the token before;
    - numbers: digits, and no letters;
    - punctuation: all that is left, other signs too.
    """
    ids = windows.tolist()
    listed = sorted({pair for row in ids for pair in pairwise(row)})
    found = dict(zip(listed, map(_kind, *_texts(listed, tokenizer))))
    return torch.tensor([[KINDS.index(found[pair]) for pair in pairwise(row)] for row in ids])


def _texts(pairs: list[tuple[int, int]], tokenizer: Any) -> tuple[list[str], list[str]]:
    """Of each pair of tokens: the text of the first, and what the second adds to it."""
    given = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    first = {token: tokenizer.decode([token], **given) for token in {token for token, _ in pairs}}
    both = [tokenizer.decode(list(pair), **given) for pair in pairs]
    before = [first[token] for token, _ in pairs]
    return before, [text[_shared(text, start) :] for text, start in zip(both, before)]


def _shared(one: str, other: str) -> int:
    """Letters that both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))


def _kind(before: str, text: str) -> str:
    letters = [letter for letter in text if letter.isalpha()]
    if not text or "\ufffd" in text or any(not unicodedata.name(a, "").startswith("LATIN") for a in letters):
        return OTHER
    if text.isspace():
        return SPACE
    if letters:
        inside = before[-1:].isalnum() or before[-1:] == "\ufffd"
        return REST if inside and not text[0].isspace() else WORD
    return NUMBER if any(sign.isdigit() for sign in text) else SIGN
