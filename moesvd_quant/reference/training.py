"""Training by transformers' Trainer: a constant rate for as long as is wanted, and a branch of it that cools down.

Going on goes on from the trunk of constant rate, never from a cooled branch, so that no restart harms it (Hägele et al.
2024, arXiv 2405.18392: a fifth of the steps, 1 - sqrt, is as good as a cosine planned for that length).
"""

import json
import math
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from ..errors import MoesvdError
from . import experts
from .texts import collate

PEAK = 3e-3
WARMUP_STEPS = 100
COOLDOWN = 0.2
SAVE_SECONDS = 600
LONG = 1000  # steps that are worth a minute of compiling
SEED = 0


class Clock(TrainerCallback):
    """Stops the Trainer at a time, makes it save every ten minutes and at its end; speed and time left for its log."""

    def __init__(self, end: float, tokens: int, left: str):
        self.end, self.tokens, self.left = end, tokens, left  # time.monotonic(), tokens of a step, what it is left to
        self.steps = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = self.saved = self.logged = time.monotonic()
        self.at = self.steps

    def on_step_end(self, args, state, control, **kwargs):
        self.steps, now = self.steps + 1, time.monotonic()
        control.should_training_stop |= now >= self.end
        if control.should_training_stop or now - self.saved > SAVE_SECONDS:
            control.should_save, self.saved = True, now

    def on_log(self, args, state, control, logs, **kwargs):
        if self.steps > self.at:
            now = time.monotonic()
            pace = (now - self.logged) / (self.steps - self.at)
            left = min(self.end - now, (state.max_steps - state.global_step) * pace)
            logs |= {"tokens/s": round(self.tokens / pace), self.left: round(left / 60, 1)}
            self.logged, self.at = now, self.steps

    def seconds_per_step(self) -> float:
        return (time.monotonic() - self.began) / self.steps


class Resuming(Trainer):
    """A Trainer whose model was read from the checkpoint, by transformers' own names.

    Trainer itself reads a checkpoint without the conversion that saving does, and leaves experts random (5.23).
    """

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        pass


@dataclass(frozen=True)
class Training:
    """A model of `config` learns `windows`, `batch` of them a step, until `steps` or until time.monotonic() is `end`.

    `folder` keeps what is needed to go on; the last fifth of steps and time is for cooling down.
    """

    config: PretrainedConfig
    windows: Dataset
    folder: Path
    batch: int
    steps: int
    device: torch.device
    end: float = math.inf

    def run(self) -> Path:
        """Checkpoint of the cooled model. Runs again from its own last checkpoint where there is one."""
        self._check()
        begun = time.monotonic()
        clock = self._clock(begun + (1 - COOLDOWN) * (self.end - begun), "minutes until cooling")
        trunk = self._phase(self.folder / "trunk", max(1, round((1 - COOLDOWN) * self.steps)), 0, None, clock)
        at = steps_of(trunk)
        cool = max(1, round(at * COOLDOWN / (1 - COOLDOWN)))
        if clock.steps and self.end < math.inf:
            cool = max(1, min(cool, int((self.end - time.monotonic()) / clock.seconds_per_step())))
        branch = self.folder / f"cooled-{at}-{cool}"
        for old in set(self.folder.glob("cooled-*")) - {branch}:
            shutil.rmtree(old)
        return self._phase(branch, at + cool, cool, trunk, self._clock(math.inf, "minutes left"))

    def _check(self) -> None:
        """Batches come in the order in which they would have come: only where they are the same."""
        file = self.folder / "data.json"
        mine = {"batch": self.batch, "windows": len(self.windows), "length": len(self.windows[0]["input_ids"])}
        if file.is_file() and (begun := json.loads(file.read_text())) != mine:
            raise MoesvdError(f"{self.folder} was begun with {begun}, not {mine}: use the same, or another --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(mine))

    def _clock(self, end: float, left: str) -> Clock:
        return Clock(end, self.batch * len(self.windows[0]["input_ids"]), left)

    def _phase(self, folder: Path, until: int, cool: int, start: Path | None, clock: Clock) -> Path:
        """Trains to step `until`, cooling down for the last `cool`, on from the checkpoint in `folder`, or `start`."""
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        begin = Path(last) if last else start
        if begin and steps_of(begin) >= until:
            return begin
        set_seed(SEED)
        if begin:
            model = AutoModelForCausalLM.from_pretrained(begin, dtype=torch.float32)
        else:
            model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        model.config.output_router_logits = True  # adds the routers' loss
        model.set_experts_implementation(experts.NAME)
        schedule = {
            "lr_scheduler_type": "warmup_stable_decay" if cool else "constant_with_warmup",
            "lr_scheduler_kwargs": {"num_decay_steps": cool, "decay_type": "1-sqrt"} if cool else {},
        }
        args = arguments(
            folder, self.device, self.batch, max_steps=until, learning_rate=PEAK, weight_decay=0.1, adam_beta2=0.95,
            max_grad_norm=1.0, optim="adamw_torch_fused", warmup_steps=WARMUP_STEPS, dataloader_drop_last=True,
            save_total_limit=1, torch_compile=self.steps >= LONG and bool(shutil.which("g++")), **schedule,
        )  # fmt: skip
        trainer = Resuming(model, args, collate, self.windows, callbacks=[clock])
        # Optimizer and random state are Trainer's own .pt files, which it opens with weights_only=True. They stay here
        # and are never published.
        trainer.train(resume_from_checkpoint=str(begin) if begin else None)
        return Path(get_last_checkpoint(str(folder)))


def steps_of(checkpoint: Path) -> int:
    """Steps that a checkpoint of Trainer has behind it."""
    return int(checkpoint.name.rpartition("-")[2])


def arguments(folder: Path, device: torch.device, batch: int, **more) -> TrainingArguments:
    """Trainer's options that training and measuring share: bfloat16 where the machine computes it fast."""
    cpu = device.type == "cpu"
    on_cpu = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    fast = on_cpu if cpu else torch.cuda.is_bf16_supported()
    return TrainingArguments(
        output_dir=str(folder), use_cpu=cpu, bf16=fast, per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch, prediction_loss_only=True, save_strategy="no", report_to="none", seed=SEED,
        logging_steps=50, disable_tqdm=not sys.stderr.isatty(), **more,
    )  # fmt: skip
