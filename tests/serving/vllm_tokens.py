"""Greedy tokens of vLLM, for `test_vllm.py`, which runs this in .venv-vllm.

vllm_tokens.py '{"folders": [...], "prompts": [[id, ...], ...], "count": n, "more": {...}}' prints a JSON line
{folder: tokens of each prompt, or why it was refused}.
"""

import json
import os
import sys

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
os.environ |= {"VLLM_LOGGING_LEVEL": "WARNING"}


def tokens(folder: str, prompts: list[list[int]], count: int, more: dict) -> list[list[int]]:
    from vllm import LLM, SamplingParams, TokensPrompt

    sys.modules.pop("llvmlite.binding.ffi", None)  # vLLM looks through all modules when it starts, and fails over this
    model = LLM(folder, dtype="float32", max_model_len=128, **more)
    asked = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
    made = model.generate(asked, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True), use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in made]


def main() -> None:
    job = json.loads(sys.argv[1])
    found: dict[str, object] = {}
    for folder in job["folders"]:
        try:
            found[folder] = tokens(folder, job["prompts"], job["count"], job["more"])
        except Exception as error:
            found[folder] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


if __name__ == "__main__":  # vLLM starts processes that import this again
    main()
