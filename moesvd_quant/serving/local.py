"""One model behind transformers' own server: chat and completions, streamed, as OpenAI's clients ask for them."""

from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

from ..errors import UsageError
from ..model.load import load
from ..model.tokenizer import load_tokenizer


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
