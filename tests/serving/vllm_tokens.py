"""Greedy tokens of vLLM, for `test_vllm.py`, which runs this in .venv-vllm.

vllm_tokens.py '{"runs": [[folder, {argument of LLM: value}], ...], "prompts": [[id, ...], ...], "count": n}' prints a
line of JSON for each run: the tokens of each prompt, or why it was refused.
"""

import json
import os
import sys
import traceback

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process for all runs: they take seconds each


def tokens(folder: str, arguments: dict, prompts: list[list[int]], count: int) -> list[list[int]]:
    from vllm import LLM, SamplingParams, TokensPrompt

    sys.modules.pop("llvmlite.binding.ffi", None)  # vLLM looks through all modules when it starts, and fails over this
    model = LLM(folder, dtype="float32", max_model_len=128, **arguments)
    asked = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
    made = model.generate(asked, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True), use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in made]


def main() -> None:
    job = json.loads(sys.argv[1])
    for folder, arguments in job["runs"]:
        try:
            found = {"tokens": tokens(folder, arguments, job["prompts"], job["count"])}
        except Exception as error:
            traceback.print_exc()
            found = {"refused": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":  # vLLM starts processes that import this again
    main()
