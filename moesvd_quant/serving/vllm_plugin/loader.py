"""How vLLM's model gets its weights: from our own reader, one decoder layer at a time."""

import os

import torch
from torch import nn
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from ...errors import ModelError


class OurModelLoader(BaseModelLoader):
    """Fills modules of ours that layers have taken, and hands the rest to the model's own `load_weights`."""

    def download_model(self, model_config) -> None:
        """A checkpoint is a folder on this machine."""

    def create_model(self, vllm_config, model_config, prefix: str = "") -> nn.Module:
        device = torch.get_default_device()
        self.checkpoint = vllm_config.quant_config.open(model_config.dtype, device)
        return super().create_model(vllm_config, model_config, prefix)

    def load_weights(self, model: nn.Module, model_config) -> None:
        """ModelError where a parameter of vLLM's model gets no weight."""
        loaded = model.load_weights(self.checkpoint.weights())
        if missing := sorted({name for name, _ in model.named_parameters()} - set(loaded)):
            raise ModelError(f"{model_config.model}: vLLM's model got no weight for {', '.join(missing[:5])}")
        open_as_many_threads_as_torch()


def open_as_many_threads_as_torch() -> None:
    """vLLM has bound its threads to cores by now. numba would count cores when it is imported, and give OpenMP another
    number of threads than vLLM's attention has planned for, which stops at that. (numba cannot be imported before: a
    vLLM that finds llvmlite when it starts fails over it.)"""
    os.environ["NUMBA_NUM_THREADS"] = str(torch.get_num_threads())
