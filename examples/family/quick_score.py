"""Quick scores of models on items of one split while developing; evaluate_model.py gives the real ones.

    python -m examples.family.quick_score --split validation --items 100 build/family/base build/family/code

It knows no test set: nothing is chosen on test items.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.family.benchmarks import BENCHMARKS, items
from examples.family.splits import Item

STOPS = {"humaneval": ("\nclass", "\ndef", "\n#", "\nif", "\nprint"), "mbpp": ("[DONE]",)}
NEW_TOKENS = 160


def score(folder: Path, split: str, count: int, only: Sequence[str] = ()) -> dict[str, float]:
    """Benchmark -> percent right, of one model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    scores = {}
    for name in only or BENCHMARKS:
        chosen = items(name, split, count)
        if name == "mmlu":
            right = letters(model, tokenizer, chosen)
        else:
            replies = generate(model, tokenizer, [item.prompt for item in chosen], STOPS.get(name, ()))
            right = GRADERS[name](chosen, replies)
        scores[name] = 100 * sum(right) / len(right)
    return scores


def generate(model: Any, tokenizer: Any, prompts: Sequence[str], stops: Sequence[str], size: int = 64) -> list[str]:
    """Greedy replies, each up to its first stop string."""
    import torch

    tokenizer.padding_side = "left"
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replies = [""] * len(prompts)
    for start in range(0, len(order), size):
        part = order[start : start + size]
        inputs = tokenizer([prompts[i] for i in part], return_tensors="pt", padding=True, return_token_type_ids=False)
        with torch.inference_mode():
            ids = model.generate(
                **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        for i, row in zip(part, ids[:, inputs["input_ids"].shape[1] :], strict=True):
            text = tokenizer.decode(row, skip_special_tokens=True)
            replies[i] = min((text.partition(stop)[0] for stop in stops), key=len, default=text)
    return replies


def letters(model: Any, tokenizer: Any, chosen: Sequence[Item]) -> list[float]:
    """Whether the right letter is the likeliest of the four."""
    import torch

    ids = [tokenizer(f" {letter}").input_ids[0] for letter in "ABCD"]
    right = []
    tokenizer.padding_side = "right"
    for start in range(0, len(chosen), 64):
        part = chosen[start : start + 64]
        inputs = tokenizer(
            [item.prompt for item in part], return_tensors="pt", padding=True, return_token_type_ids=False
        )
        with torch.inference_mode():
            logits = model(**inputs).logits
        last = inputs["attention_mask"].sum(1) - 1
        best = logits[torch.arange(len(part)), last][:, ids].argmax(1)
        right += [float(b == item.row["answer"]) for b, item in zip(best.tolist(), part, strict=True)]
    return right


def _humaneval(chosen: Sequence[Item], replies: Sequence[str]) -> list[float]:
    tests = [f"{item.row['test']}\ncheck({item.row['entry_point']})\n" for item in chosen]
    return run([item.prompt + reply + "\n" + test for item, reply, test in zip(chosen, replies, tests, strict=True)])


def _mbpp(chosen: Sequence[Item], replies: Sequence[str]) -> list[float]:
    return run([reply + "\n" + "\n".join(item.row["test_list"]) for item, reply in zip(chosen, replies, strict=True)])


def _maths(chosen: Sequence[Item], replies: Sequence[str]) -> list[float]:
    """The last box or the last number, letter by letter."""

    def answer(text: str) -> str:
        boxed = re.findall(r"boxed\{((?:[^{}]|\{[^{}]*\})*)\}", text)
        numbers = re.findall(r"-?\d+", text)
        return boxed[-1] if boxed else numbers[-1] if numbers else "none"

    golds = [answer(item.answer) for item in chosen]
    return [float(answer(reply) == gold) for reply, gold in zip(replies, golds, strict=True)]


def _ifeval(chosen: Sequence[Item], replies: Sequence[str]) -> list[float]:
    import langdetect
    from lm_eval.tasks.ifeval import utils

    langdetect.DetectorFactory.seed = 0
    right = []
    for item, reply in zip(chosen, replies, strict=True):
        followed = utils.process_results(dict(item.row), [reply])["inst_level_strict_acc"]
        right.append((all(followed) + sum(followed) / len(followed)) / 2)
    return right


GRADERS = {"humaneval": _humaneval, "mbpp": _mbpp, "gsm8k": _maths, "math": _maths, "ifeval": _ifeval}

# Becomes nobody with limits, then runs the programs that it reads, one fork each; whether they raise decides.
_RUNNER = """
import json, os, resource, signal, sys, typing
sources = json.load(sys.stdin)
null = os.open("/dev/null", os.O_RDWR)
for kind, limit in (("AS", 1 << 30), ("FSIZE", 0), ("CPU", 60), ("NOFILE", 16), ("CORE", 0), ("NPROC", 64)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + kind), (limit, limit))
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
verdicts = []
for source in sources:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for descriptor in (0, 1, 2):
                os.dup2(null, descriptor)
            signal.alarm(3)
            exec(compile(source, "candidate", "exec"), {"__name__": "candidate"})
            code = 0
        finally:
            os._exit(code)
    verdicts.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0)
os.write(1, json.dumps(verdicts).encode())
"""


def run(sources: Sequence[str]) -> list[float]:
    """Which programs end without raising. For the family's own tiny models only: limits and another user, but no jail."""
    with tempfile.TemporaryDirectory() as empty:
        os.chmod(empty, 0o755)
        command = [sys.executable, "-I", "-S", "-c", _RUNNER]
        done = subprocess.run(
            command, input=json.dumps(list(sources)), stdout=subprocess.PIPE, text=True, env={}, cwd=empty,
            start_new_session=True, check=True,
        )  # fmt: skip
    return [float(verdict) for verdict in json.loads(done.stdout)]


def main(argv: Sequence[str] | None = None) -> int:
    """Score the models; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--split", default="validation", choices=("validation", "train"))
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--only", nargs="*", default=())
    arguments = parser.parse_args(argv)
    names = arguments.only or list(BENCHMARKS)
    print(f"{'model':28}" + "".join(f"{name:>10}" for name in names) + f"{'mean':>10}", flush=True)
    for folder in arguments.models:
        scores = list(score(folder, arguments.split, arguments.items, names).values())
        numbers = "".join(f"{value:10.1f}" for value in [*scores, sum(scores) / len(scores)])
        print(f"{'/'.join(folder.parts[-1:]):28}{numbers}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
