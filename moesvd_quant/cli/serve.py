"""Verbs that run a model: serve, chat."""

from pathlib import Path
from typing import Annotated

import typer

from ..model.named import resolve_device, resolve_model
from .common import Device, app

Folder = Annotated[str, typer.Argument(help="Checkpoint, Hugging Face folder, or `reference`.")]


@app.command()
def serve(
    model: Folder,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: from other machines, too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    device: Device = "auto",
) -> None:
    """Serve a model to OpenAI's clients: chat and completions, streamed.

    By vLLM where it is installed and has the architecture, on the device it is built for; else by transformers' own
    server.
    """
    from ..run.threads import sync_threads
    from ..serving.local import become_vllm, run_server, vllm_serves

    folder = Path(resolve_model(model)).resolve()
    by_vllm = vllm_serves(folder)
    print(
        f"model {folder.name}, by {'vLLM' if by_vllm else 'transformers'}: http://{host}:{port}/v1 (chat/completions, "
        "completions, models); stop with Ctrl-C"
    )
    if by_vllm:
        become_vllm(folder, host, port)
    sync_threads()
    run_server(folder, resolve_device(device), host, port)


@app.command()
def chat(
    model: Folder,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.7,
    device: Device = "auto",
) -> None:
    """Talk to a model in the terminal, or have it continue your text where it has no chat template. Empty line: end."""
    from ..run.threads import sync_threads
    from ..serving.talk import Talk

    sync_threads()
    talk = Talk(Path(resolve_model(model)), resolve_device(device), tokens, temperature)
    print(talk.greeting)
    while text := _asked("> "):
        for piece in talk.answer(text):
            print(piece, end="", flush=True)
        print(f"\n[{talk.figures}]")


def _asked(prompt: str) -> str:
    """A line from the terminal; empty at its end."""
    try:
        return input(prompt)
    except EOFError:
        return ""
