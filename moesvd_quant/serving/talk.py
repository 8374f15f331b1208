"""A conversation with a model, a piece of an answer after the other."""

import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import psutil
import torch
from transformers import TextIteratorStreamer

from ..model.load import load
from ..model.tokenizer import load_tokenizer


class Talk:
    """tokens: of an answer, at most; temperature: 0 takes the likeliest token."""

    def __init__(self, folder: Path, device: str, tokens: int, temperature: float):
        self.model, self.tokenizer = load(folder, device=device), load_tokenizer(folder)
        self.templated = getattr(self.tokenizer, "chat_template", None) is not None
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        self._how = {"max_new_tokens": tokens, "pad_token_id": self.tokenizer.pad_token_id or 0} | sampling
        self._said: list[dict[str, str]] = []
        self.figures = ""

    @property
    def greeting(self) -> str:
        """What a user has to know before."""
        how = "a conversation" if self.templated else "it has no chat template: it continues each text of yours"
        return f"{self.model.name_or_path}: {how}. An empty line ends it."

    def answer(self, text: str) -> Iterator[str]:
        """Pieces of the answer to a text; `figures` says afterwards how fast it came."""
        if self.templated:
            self._said.append({"role": "user", "content": text})
            asked = self.tokenizer.apply_chat_template(
                self._said, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            asked = self.tokenizer(text, return_tensors="pt")
        asked = {key: asked[key].to(self.model.device) for key in ("input_ids", "attention_mask")}
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        made: list[torch.Tensor] = []
        failed: list[BaseException] = []

        def generate() -> None:
            try:
                made.append(self.model.generate(**asked, **self._how, streamer=streamer))
            except BaseException as error:
                failed.append(error)
                streamer.end()

        start, pieces = time.perf_counter(), []
        worker = Thread(target=generate, daemon=True)
        worker.start()
        for piece in streamer:
            pieces.append(piece)
            yield piece
        worker.join()
        if failed:
            raise failed[0]
        self._said.append({"role": "assistant", "content": "".join(pieces)})
        count, seconds = made[0].shape[1] - asked["input_ids"].shape[1], time.perf_counter() - start
        self.figures = f"{count} tokens, {count / seconds:.1f} a second, {self._memory() / 1e9:.2f} GB in use"

    def _memory(self) -> int:
        """Bytes that the model and the process hold where the model is."""
        if self.model.device.type == "cuda":
            return torch.cuda.memory_allocated(self.model.device)
        return psutil.Process().memory_info().rss
