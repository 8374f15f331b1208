"""A checkpoint behind the server, asked by OpenAI's own client; and in the terminal."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch

import moesvd_quant
from moesvd_quant.errors import UsageError
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run
from moesvd_quant.serving import local
from moesvd_quant.serving.talk import Talk

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
MOESVD = [sys.executable, "-c", "from moesvd_quant.cli import main; main()"]


@pytest.fixture(scope="module")
def checkpoint(make_model, tmp_path_factory, text):
    out = tmp_path_factory.mktemp("served")
    (out / "mine.yaml").write_text("budget: 3bpw\nstages: [svd, {gptq: {format: best}}]")
    small = [f"calibration.dataset={text}", "calibration.samples=8", "calibration.length=32"]
    recipe = load_recipe(out / "mine.yaml", [*small, "calibration.self_written=0.0", "evaluate.perplexity=[]"])
    return Run(recipe, make_model("mixtral"), out / "out").run()[-1]


@pytest.fixture(scope="module")
def with_template(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "small-moe"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def address(with_template):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*MOESVD, "serve", str(with_template), "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, server.communicate()[0]
                time.sleep(0.5)
        yield f"{url}/v1"
    finally:
        server.terminate()
        server.wait(30)


def greedy(folder, prompt_ids, count):
    model = moesvd_quant.load(folder)
    with torch.no_grad():
        made = model.generate(prompt_ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return moesvd_quant.model.tokenizer.load_tokenizer(folder).decode(
        made[0, prompt_ids.shape[1] :], skip_special_tokens=True
    )


@pytest.mark.timeout(300)
def test_openais_client_gets_completions_and_chat_whole_and_streamed(address, with_template):
    from openai import BadRequestError, OpenAI

    client = OpenAI(base_url=address, api_key="none")
    assert [model.id for model in client.models.list()] == ["small-moe"]
    tokenizer = moesvd_quant.model.tokenizer.load_tokenizer(with_template)
    given = {"model": "small-moe", "max_tokens": 8, "temperature": 0}
    done = client.completions.create(prompt="abc def", **given)
    expected = greedy(with_template, tokenizer("abc def", return_tensors="pt").input_ids, 8)
    assert done.choices[0].text == expected
    messages = [{"role": "user", "content": "abc"}]
    whole = client.chat.completions.create(messages=messages, **given).choices[0].message.content
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert whole == greedy(with_template, ids["input_ids"], 8)
    pieces = client.chat.completions.create(messages=messages, stream=True, **given)
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert streamed.rstrip("�") == whole.rstrip("�")  # half a character at the end is held back
    with pytest.raises(BadRequestError, match="400"):
        client.completions.create(prompt="abc", model="another")


def test_in_the_terminal_with_a_template_and_without(with_template, checkpoint):
    talk = Talk(with_template, "cpu", 6, 0.0)
    assert "a conversation" in talk.greeting
    first = "".join(talk.answer("abc"))
    ids = talk.tokenizer.apply_chat_template(
        [{"role": "user", "content": "abc"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert first == greedy(with_template, ids["input_ids"], 6)
    assert "tokens" in talk.figures and "GB in use" in talk.figures
    "".join(talk.answer("def"))
    assert [turn["role"] for turn in talk._said] == ["user", "assistant"] * 2
    plain = Talk(checkpoint, "cpu", 6, 0.0)
    assert "continues" in plain.greeting
    ids = plain.tokenizer("abc", return_tensors="pt").input_ids
    assert "".join(plain.answer("abc")) == greedy(checkpoint, ids, 6)


def test_what_fails_while_it_answers_is_said(checkpoint, monkeypatch):
    talk = Talk(checkpoint, "cpu", 6, 0.0)
    monkeypatch.setattr(talk.model, "generate", lambda **given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(talk.answer("abc"))


def test_the_verb_chat_reads_lines_until_an_empty_one(checkpoint):
    command = [*MOESVD, "chat", str(checkpoint), "--tokens", "4", "--temperature", "0", "--device", "cpu"]
    done = subprocess.run(command, input="abc\n\n", capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "4 tokens" in done.stdout, done.stderr


def test_without_a_server_it_says_what_to_install(checkpoint, monkeypatch):
    monkeypatch.setattr(local, "find_spec", lambda name: None if name == "uvicorn" else True)
    with pytest.raises(UsageError, match=r"uvicorn: not installed; pip install 'moesvd_quant\[serve\]'"):
        local.run_server(checkpoint, "cpu", "127.0.0.1", 0)
