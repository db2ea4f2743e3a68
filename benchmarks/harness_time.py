"""Time that evaluate_model.py itself takes for an item: everything but the model, which here answers at once.

    python benchmarks/harness_time.py --data_dir DATA
    python benchmarks/harness_time.py --data_dir DATA --benchmarks gsm8k,mmlu --limit 500

The stand-in model gives every row the published solution of the next row (mostly wrong, which costs graders most), every second
code benchmark row its own. Counted are the whole run from flags to results, without importing libraries: reading data, prompts,
tokens, batches, extraction, grading, samples and results files. Programs in the sandbox are timed apart.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.benchmarks import PAPER, get_benchmark
from evaluation.data import load_data

TOKENIZER = Path(__file__).resolve().parent.parent / "tests" / "goldens" / "inputs" / "base"
SOLUTIONS = {"humaneval": "canonical_solution", "mbpp": "code", "gsm8k": "solution", "math": "solution"}
INSTANT = "Here is a short answer.\n\nIt has two paragraphs, and some words in them.\n"


class InstantModel:
    """Answers without a forward pass, as lm_eval's models do."""

    def __init__(self, tokenizer: Any, answers: Sequence[str]):
        self.tokenizer = tokenizer
        self.add_bos_token: bool | None = None
        self.batch_size_per_gpu = 1
        self.finished: list[Any] = []
        self.answers = list(answers)
        self.given = 0

    def tok_encode(self, text: str) -> list[int]:
        """Token ids."""
        return list(self.tokenizer.encode(text))

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The last message; no template is applied here."""
        return messages[-1]["content"]

    def generate_until(self, instances: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The prepared answers, in turn; prompts are tokenized once more, as lm_eval does."""
        from evaluation.transformers_model import Finish

        for instance in instances:
            self.tok_encode(instance.args[0])
            self.finished.append(Finish(self.answers[self.given % len(self.answers)], 100, False))
            self.given += 1
        return [finish.text for finish in self.finished]

    def loglikelihood(self, instances: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Equal scores; prompt and choice are tokenized, as lm_eval does."""
        for instance in instances:
            self.tok_encode("".join(instance.args))
            self.tok_encode(instance.args[0])
        return [(-1.0, False)] * len(instances)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table; exit code 1 where an item costs 10 ms of CPU time or more, the sandbox's work left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data_dir", type=Path, required=True, help="folder with the test sets, as for evaluate_model.py"
    )
    parser.add_argument("--benchmarks", default=",".join(PAPER), help="default: the paper's six")
    parser.add_argument("--limit", type=int, help="rows of each benchmark (default: all)")
    arguments = parser.parse_args(argv)
    warm_up()
    worst, all_seconds, all_cpu, all_items = 0.0, 0.0, 0.0, 0
    print(f"{'benchmark':10} {'items':>6} {'ms an item':>11} {'CPU':>7} {'prompts':>8} {'grading':>8}")
    for name in arguments.benchmarks.split(","):
        before = cpu_seconds()
        items, seconds, entry = measure(name, arguments.data_dir, arguments.limit)
        cpu = cpu_seconds() - before
        parts = [1000 * entry["seconds"][key] / items for key in ("generate", "grade")]
        sandboxed = get_benchmark(name).runs_code
        note = "  (grading: the sandbox)" if sandboxed else ""
        numbers = (1000 * seconds / items, 1000 * cpu / items, *parts)
        print(f"{name:10} {items:6} {numbers[0]:11.2f} {numbers[1]:7.2f} {numbers[2]:8.2f} {numbers[3]:8.2f}{note}")
        worst = max(worst, numbers[1] if not sandboxed else 0.0)
        all_seconds, all_cpu, all_items = all_seconds + seconds, all_cpu + cpu, all_items + items
    print(f"{'all':10} {all_items:6} {1000 * all_seconds / all_items:11.2f} {1000 * all_cpu / all_items:7.2f}")
    return int(worst >= 10)


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended; unlike the clock, the same on a busy machine."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def warm_up() -> None:
    """Import what a run imports."""
    for module in ("lm_eval.api.task", "lm_eval.models.huggingface", "transformers"):
        importlib.import_module(module)


def measure(name: str, data_dir: Path, limit: int | None) -> tuple[int, float, dict[str, Any]]:
    """Run one benchmark. Returns its items, the seconds of the whole run, its entry in the results."""
    from transformers import AutoTokenizer

    from evaluation import backends, make_request
    from evaluation.model import Model, ModelOptions
    from evaluation.run import evaluate

    rows = load_data(get_benchmark(name), data_dir).rows
    own = [row[SOLUTIONS[name]] if name in SOLUTIONS else INSTANT for row in rows]
    answers = own[1:] + own[:1]
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)

    def load(folder: Path, label: str, options: ModelOptions) -> Model:
        return Model(InstantModel(tokenizer, answers), label, options, 32768, {})

    backends.load_model = load
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        shutil.copytree(TOKENIZER, model)
        request = make_request(
            model=str(model),
            benchmarks=name,
            data_dir=str(data_dir),
            limit=limit,
            dtype="float32",
            save_path=str(Path(place) / "out.json"),
            quiet=True,
        )
        started = time.monotonic()
        outcome = evaluate(request)
        seconds = time.monotonic() - started
    entry = outcome.results["benchmarks"][name]
    return entry["n"], seconds, entry


if __name__ == "__main__":
    sys.exit(main())
