"""Training of what `adapters.Trained` names by transformers' Trainer: resumed at any step, it ends in the same bits."""

import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..errors import UsageError
from ..memory.files import write_text
from .losses import divergence, next_token
from .rows import RowPruning
from .teacher import Predict

TRAINED, WHOLE = "trained.safetensors", "whole"  # in a trainer's checkpoint: what is trained; that all was written

Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]  # model, token ids, numbers of these windows
Progress = Callable[[int, int], None]


def lm_loss(model: nn.Module, ids: torch.Tensor, numbers: torch.Tensor | None = None) -> torch.Tensor:
    return next_token(model(input_ids=ids, use_cache=False).logits, ids)


def distill_loss(predict: Predict) -> Loss:
    def loss(model: nn.Module, ids: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        return divergence(model(input_ids=ids, use_cache=False).logits, predict(numbers, ids))

    return loss


class Healer(Trainer):
    """Trainer whose checkpoints hold what is trained and nothing else; validation is always next-token loss."""

    def __init__(self, tensors: dict[str, nn.Parameter], loss: Loss, **more):
        super().__init__(**more)
        self.tensors, self.loss = tensors, loss
        self.model_accepts_loss_kwargs = False  # the losses are means over a micro-batch
        self.loss_is_scaled_for_ga = False
        self.remove_callback(PrinterCallback)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = self.loss(model, inputs["input_ids"], inputs["number"])
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            return lm_loss(model, self._prepare_inputs(inputs)["input_ids"]).detach(), None, None

    def _save(self, output_dir=None, state_dict=None):
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file({k: p.detach().cpu().contiguous() for k, p in self.tensors.items()}, Path(output_dir) / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        put(self.tensors, Path(resume_from_checkpoint))


@torch.no_grad()
def put(tensors: dict[str, nn.Parameter], checkpoint: Path) -> None:
    """Fills the trained parameters from a checkpoint of the trainer."""
    stored = load_file(checkpoint / TRAINED)
    for name, parameter in tensors.items():
        parameter.copy_(stored[name])


class Watch(TrainerCallback):
    """Marks whole checkpoints, stops where validation no longer gains, tells of progress."""

    def __init__(self, patience: int, since: int, progress: Progress):
        self.patience, self.since, self.progress = patience, since, progress

    def on_save(self, args, state, control, **_):
        write_text(Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE, "")

    def on_evaluate(self, args, state, control, **_):
        control.should_training_stop |= stale(state.log_history, self.patience, self.since)

    def on_step_end(self, args, state, control, **_):
        self.progress(state.global_step, state.max_steps)


def validations(history: list[dict]) -> list[tuple[int, float]]:
    """(step, loss) of every validation in a trainer's log."""
    return [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]


def stale(history: list[dict], patience: int, since: int = 0) -> bool:
    """Whether the last `patience` validations from the step `since` on all failed to be the best."""
    losses = [loss for step, loss in validations(history) if step >= since]
    return len(losses) > patience and min(losses[:-patience]) <= min(losses[-patience:])


def whole_checkpoints(folder: Path) -> list[Path]:
    """The trainer's checkpoints in order of step; one that a killed process left unfinished is deleted."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in found:
        if not (path / WHOLE).is_file():
            shutil.rmtree(path)
    return [path for path in found if path.exists()]


def train(
    model: nn.Module,
    tensors: dict[str, nn.Parameter],
    loss: Loss,
    options,
    data,
    steps: int,
    folder: Path,
    device: torch.device,
    seed: int,
    progress: Progress,
    pruning: RowPruning | None = None,
) -> list[dict]:
    """Trains `tensors` of the model for at most `steps` steps and leaves them at the best validation, the state before
    the first step included. Returns the log: {"step", "loss", "learning_rate"} and {"step", "eval_loss"}.

    pruning: takes rows away meanwhile; only validations after it is done with that count.

    Every `validate_every` steps the state goes to `folder`, from which an interrupted call goes on. ValueError where
    the loss is not finite, or the device is another than the first GPU.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in tensors.values():
        parameter.requires_grad_(True)
    if options.checkpointing:
        with warnings.catch_warnings():  # renamed in the newest transformers; the old name serves all of 5
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False})
    since = pruning.done if pruning else 0
    every = min(options.validate_every, steps - since)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=options.microbatch,
        per_device_eval_batch_size=options.microbatch,
        gradient_accumulation_steps=options.batch // options.microbatch,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(options.warmup * steps),
        weight_decay=0.0,
        bf16=device.type == "cuda",
        use_cpu=device.type == "cpu",
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=1,
        seed=seed,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        prediction_loss_only=True,
    )
    if device.type == "cuda" and device.index:
        raise UsageError(f"--device {device}: training uses the first GPU; choose it by CUDA_VISIBLE_DEVICES instead")
    if args.n_gpu > 1:
        args._n_gpu = 1  # one device: on several the Trainer would copy the model to each
    healer = Healer(
        tensors,
        loss,
        model=model,
        args=args,
        train_dataset=[{"input_ids": ids, "number": number} for number, ids in enumerate(data.train)],
        eval_dataset=[{"input_ids": ids} for ids in data.validation],
        callbacks=[*([pruning] if pruning else []), Watch(options.patience, since, progress)],
    )
    start = {"step": 0, "eval_loss": healer.evaluate()["eval_loss"]}
    before = {name: parameter.detach().clone() for name, parameter in tensors.items()}
    done = whole_checkpoints(folder)
    state = TrainerState.load_from_json(str(done[-1] / "trainer_state.json")) if done else TrainerState()
    if state.global_step < steps and not stale(state.log_history, options.patience, since):
        healer.train(resume_from_checkpoint=str(done[-1]) if done else None)
        state = healer.state
    history = [start, *(entry for entry in state.log_history if {"loss", "eval_loss"} & entry.keys())]
    for entry in history:
        if not math.isfinite(entry.get("loss", 0.0)):
            raise UsageError(f"step {entry['step']}: the training loss is {entry['loss']}; lower lora.lr")
    best = min((found for found in validations(history) if found[0] >= since), key=lambda pair: pair[1])[0]
    if best:
        put(tensors, folder / f"checkpoint-{best}")
    else:
        for name, parameter in tensors.items():
            parameter.data.copy_(before[name])
    keep = ("step", "loss", "learning_rate", "eval_loss")
    return [{key: entry[key] for key in keep if key in entry} for entry in history]
