"""Which folders are ours, and with which of vLLM's arguments they can be served."""

from functools import cache, wraps
from pathlib import Path

from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.model_loader import register_model_loader
from vllm.transformers_utils.config import register_config_parser

from ...errors import UsageError
from ...memory.files import read_json
from ...runtime.parts import layout_from
from .config import OurConfigParser
from .loader import OurModelLoader
from .names import NAME
from .quantization import OurQuantization
from .sharding import require_splittable

FORMATS = ("auto", "safetensors", NAME)  # of weight files, by `--load-format`


def is_ours(model: str | Path) -> bool:
    """Whether a folder holds one of our checkpoints. What stands on a hub has to be downloaded first."""
    file = Path(model) / "config.json"
    return file.is_file() and read_json(file).get("model_type") == NAME


@cache
def take_our_folders() -> None:
    """Has vLLM read our folders by our parser and our loader, as `vllm-gguf-plugin` does for its files; all others go
    their usual way."""
    register_config_parser(NAME)(OurConfigParser)
    register_model_loader(NAME)(OurModelLoader)
    register_quantization_config(NAME)(OurQuantization)
    usual = EngineArgs.create_model_config

    @wraps(usual)
    def create_model_config(self):
        if is_ours(self.model):
            require_served(self)
            self.config_format = self.load_format = NAME
        return usual(self)

    EngineArgs.create_model_config = create_model_config


def require_served(arguments: EngineArgs) -> None:
    """UsageError that names the argument with which our checkpoints cannot be served, and what to do."""
    if arguments.load_format not in FORMATS:
        raise UsageError(f"--load-format {arguments.load_format}: our checkpoints are safetensors; leave it away")
    if arguments.enable_expert_parallel:
        raise UsageError(
            "--enable-expert-parallel: experts of ours share factors, and do not stand apart; use "
            "--tensor-parallel-size, which splits every expert of a checkpoint whose factors are in floating point"
        )
    for flag, value in (
        ("--pipeline-parallel-size", arguments.pipeline_parallel_size),
        ("--data-parallel-size", arguments.data_parallel_size),
    ):
        if value > 1:
            raise UsageError(f"{flag} {value}: not supported; start one server for each copy of the model")
    if arguments.enable_lora:
        raise UsageError("--enable-lora: adapters do not fit packed or factorized weights; merge them by stage `lora`")
    layout = layout_from(read_json(Path(arguments.model) / "config.json").get("moesvd"))
    require_splittable(arguments.model, layout, arguments.tensor_parallel_size)
