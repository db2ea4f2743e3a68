"""Grade the published solutions of whole test sets through the command's own path, and junk after them.

    python benchmarks/grade_references.py --data_dir DATA
    python benchmarks/grade_references.py --data_dir DATA --benchmarks math,gsm8k

Expected: GSM8K 1319/1319, MATH 5000/5000, HumanEval 164/164, MBPP 500/500, and 0 for junk. Every solution that is not graded
right is listed. Exit code 1 where one of them is not, or where junk is right.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate_model
from evaluation.benchmarks import get_benchmark
from evaluation.data import load_data

FIELDS = {"humaneval": "canonical_solution", "mbpp": "code", "gsm8k": "solution", "math": "solution"}
JUNK = "I do not know the answer to this one."


def main(argv: Sequence[str] | None = None) -> int:
    """Grade and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data_dir", type=Path, required=True, help="folder with the test sets, as for evaluate_model.py"
    )
    parser.add_argument("--benchmarks", default=",".join(FIELDS), help=f"any of {', '.join(FIELDS)} (default: all)")
    arguments = parser.parse_args(argv)
    failed = False
    for name in arguments.benchmarks.split(","):
        rows = load_data(get_benchmark(name), arguments.data_dir).rows
        for kind, texts in (("references", [row[FIELDS[name]] for row in rows]), ("junk", [JUNK] * len(rows))):
            started = time.monotonic()
            entry, wrong = grade(name, texts, arguments.data_dir)
            seconds = time.monotonic() - started
            right = len(texts) - len(wrong)
            level = entry["grader"].get("sandbox_level")
            print(
                f"{name:10} {kind:10} {right:5} of {len(texts)} right, {1000 * seconds / len(texts):6.2f} ms an item"
                + (f", sandbox {level}" if level else "")
            )
            if kind == "junk":
                failed |= right > 0
                continue
            failed |= bool(wrong)
            for sample in wrong:
                print(f"  row {sample['index']}: {sample['status']}: {sample['detail'] or sample['answer']!r:.200}")
    return int(failed)


def grade(name: str, texts: Sequence[str], data_dir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Grade one response for every row by `evaluate_model.py --stage score`.

    Returns: the benchmark's entry in the results, and the samples that are not right.
    """
    with tempfile.TemporaryDirectory() as folder:
        responses, save_path = Path(folder) / "given.jsonl", Path(folder) / "scored.json"
        lines = [json.dumps({"benchmark": name, "index": index, "response": text}) for index, text in enumerate(texts)]
        responses.write_text("\n".join(lines) + "\n")
        flags = [
            "--stage",
            "score",
            "--responses",
            responses,
            "--data_dir",
            data_dir,
            "--save_path",
            save_path,
            "--quiet",
        ]
        code = evaluate_model.main([str(flag) for flag in flags])
        if code:
            raise SystemExit(code)
        entry = json.loads(save_path.read_text())["benchmarks"][name]
        samples = save_path.with_name("scored.samples.jsonl").read_text().split("\n")
    return entry, [sample for line in samples if line and (sample := json.loads(line))["score"] < 1]


if __name__ == "__main__":
    sys.exit(main())
