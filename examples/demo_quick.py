"""Merge, relax with AIM, and evaluate, on the tiny family in under a minute: `make demo-quick`.

    PYTHONPATH=. python examples/demo_quick.py
    PYTHONPATH=. python examples/demo_quick.py --folder /tmp/demo

Runs the commands as one types them, and prints them first. No network, no GPU. Run it where the README is.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FAMILY = Path("examples/family")
MODELS = ("code", "instruct", "math")
BENCHMARKS = ("humaneval", "mbpp", "mmlu", "math", "gsm8k", "ifeval")
ITEMS = 32
MARKER = "demo_quick"
"""Name of a file that shows that a folder is the demo's own, to be made anew."""


def commands(folder: Path, items: int) -> list[list[str]]:
    """The command lines, in order."""
    merged, relaxed = folder / "merged", folder / "merged_AIM"
    base = str(FAMILY / "models/base")
    models = ",".join(str(FAMILY / "models" / name) for name in MODELS)
    text = str(FAMILY / "data/calibration/mixture.jsonl")
    merge = ["merge.py", "--method", "task_arithmetic", "--base_model", base, "--models_to_merge", models]
    relax = ["performAIM.py", "--merged_model", str(merged), "--pretrained_model_name", base, "--omega", "0.4"]
    relax += ["--calibration_data", text]
    lines = [[*merge, "--save_path", str(merged)], [*relax, "--save_path", str(relaxed)]]
    for model in (merged, relaxed):
        evaluate = ["evaluate_model.py", "--model", str(model), "--data_dir", str(FAMILY / "data/validation")]
        lines.append([*evaluate, "--limit", str(items), "--dtype", "float32", "--save_path", f"{model}.json"])
    return [["python", *line, "--quiet"] for line in lines]


def run(command: Sequence[str]) -> int:
    """Print a command line and run it. Returns: its exit code."""
    print(f"$ {shlex.join(command)}", flush=True)
    return subprocess.run([sys.executable, *command[1:]], check=False).returncode


def format_table(folder: Path) -> str:
    """The scores of both models in percent, from their results files."""
    lines = ["".join(["model     ", *(f"{name:>10}" for name in BENCHMARKS)])]
    for name in ("merged", "merged_AIM"):
        entries = json.loads((folder / f"{name}.json").read_text())["benchmarks"]
        lines.append(f"{name:10}" + "".join(f"{100 * entries[each]['score']:10.1f}" for each in BENCHMARKS))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path("demo_quick"), help="for what is made (default: demo_quick)"
    )
    parser.add_argument("--items", type=int, default=ITEMS, help=f"of each benchmark (default {ITEMS})")
    arguments = parser.parse_args(argv)
    folder = arguments.folder
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            parser.error(f"--folder {folder}: holds something else. Choose a folder that is empty or not there.")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    (folder / ".gitignore").write_text("*\n")
    print(
        "Three fine-tunes of a tiny base model, for code, instructions and mathematics, become one model.", flush=True
    )
    for command in commands(folder, arguments.items):
        code = run(command)
        if code:
            return code
    print(f"\n{format_table(folder)}\n")
    print(
        f"Percent, {arguments.items} items of each benchmark, so that chance counts for much. `make demo` runs the whole experiment."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
