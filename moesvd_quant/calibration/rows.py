"""What a row of a text file or dataset means, the same wherever text is read."""

from collections.abc import Iterator
from typing import Any

from ..errors import MoesvdError

ALPACA = "### Instruction:\n{instruction}\n\n{given}### Response:\n{output}"


class TextError(MoesvdError, ValueError):
    """Text that cannot be read or is too short; the message says what is there and what is needed."""


def texts_of(rows: Iterator[dict], where: str, tokenizer=None) -> Iterator[str]:
    """The document of each row: its column `text`, `messages` (through the tokenizer's chat template), or Alpaca's
    `instruction`, `input` and `output`. A row whose text is null holds no document.

    Raises TextError that names the row and the column which is something else.
    """
    for number, row in enumerate(rows, 1):
        text = _text_of(row, f"{where}, row {number}", tokenizer)
        if text is not None:
            yield text


def _text_of(row: dict, where: str, tokenizer) -> str | None:
    if row.get("text") is not None:
        return _string(row, "text", where)
    if row.get("messages") is not None:
        return _conversation(row["messages"], where, tokenizer)
    if row.get("instruction") is not None and row.get("output") is not None:
        instruction, output = _string(row, "instruction", where), _string(row, "output", where)
        given = f"### Input:\n{_string(row, 'input', where)}\n\n" if row.get("input") else ""
        return ALPACA.format(instruction=instruction, given=given, output=output)
    if {"text", "messages"} & row.keys() or {"instruction", "output"} <= row.keys():
        return None
    raise TextError(f"{where}: has columns {', '.join(row)}; text, messages, or instruction and output are read")


def _string(row: dict, column: str, where: str) -> str:
    value: Any = row[column]
    if not isinstance(value, str):
        raise TextError(f"{where}: {column} is {type(value).__name__} and not a string: {str(value)[:60]!r}")
    return value


def _conversation(messages, where: str, tokenizer) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise TextError(f"{where}: holds conversations, and the model's tokenizer has no chat template")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates raise errors of many kinds
        raise TextError(f"{where}: the chat template of the model does not take these messages: {error}") from error
