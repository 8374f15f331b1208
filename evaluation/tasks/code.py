"""Scores of programs that a model wrote: each is run in a process of its own, with nothing but its tests."""

import secrets
import subprocess
import sys
from tempfile import TemporaryDirectory

SECONDS = 5.0  # that a program may take


def passes(program: str) -> bool:
    """Whether a program runs to its end. It has this user's rights: who calls this has asked first."""
    ended = secrets.token_hex(16)  # a program that leaves before its tests does not print it
    with TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", f"{program}\nprint('\\n{ended}')"],
                cwd=folder, env={}, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                timeout=SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0 and done.stdout.endswith(f"{ended}\n")


def build_predictions(resps: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """As lm-eval does: the prompt is the head of the function, and what the model writes goes on with it."""
    return [[doc["prompt"] + said for said in written] for written, doc in zip(resps, docs)]


def pass_at_k(references: list[str], predictions: list[list[str]], k: list[int]) -> dict[str, float]:
    """{"pass@1": share of the answers to one question that pass its test}; k is [1], as in lm-eval's task."""
    [test], [answers] = references, predictions
    return {f"pass@{one}": sum(passes(f"{answer}\n{test}") for answer in answers) / len(answers) for one in k}


def pass_at_1(references: list[str] | str, predictions: list[str] | list[list[str]]) -> float:
    """The same for MBPP, whose answers are programs."""
    tests = [references] if isinstance(references, str) else references
    answers = [one if isinstance(one, list) else [one] for one in predictions]
    return pass_at_k(tests, answers, [1])["pass@1"]


def list_fewshot_samples() -> list[dict]:
    """The three examples of lm-eval's task: the first of MBPP's prompts."""
    return [
        {
            "task_id": 2,
            "text": "Write a function to find the similar elements from the given two tuple lists.",
            "code": "def similar_elements(test_tup1, test_tup2):\r\n"
            "  res = tuple(set(test_tup1) & set(test_tup2))\r\n  return (res) ",
            "test_list": [
                "assert similar_elements((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)",
                "assert similar_elements((1, 2, 3, 4),(5, 4, 3, 7)) == (3, 4)",
                "assert similar_elements((11, 12, 14, 13),(17, 15, 14, 13)) == (13, 14)",
            ],
            "is_fewshot": True,
        },
        {
            "task_id": 3,
            "text": "Write a python function to identify non-prime numbers.",
            "code": "import math\r\ndef is_not_prime(n):\r\n    result = False\r\n"
            "    for i in range(2,int(math.sqrt(n)) + 1):\r\n        if n % i == 0:\r\n            result = True\r\n"
            "    return result",
            "test_list": [
                "assert is_not_prime(2) == False",
                "assert is_not_prime(10) == True",
                "assert is_not_prime(35) == True",
            ],
            "is_fewshot": True,
        },
        {
            "task_id": 4,
            "text": "Write a function to find the largest integers from a given list of numbers using heap queue "
            "algorithm.",
            "code": "import heapq as hq\r\ndef heap_queue_largest(nums,n):\r\n"
            "  largest_nums = hq.nlargest(n, nums)\r\n  return largest_nums",
            "test_list": [
                "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],3)==[85, 75, 65] ",
                "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],2)==[85, 75] ",
                "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],5)==[85, 75, 65, 58, 35]",
            ],
            "is_fewshot": True,
        },
    ]
