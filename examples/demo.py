"""A small merge from start to end: `make demo`.

    PYTHONPATH=. python examples/demo.py
    PYTHONPATH=. python examples/demo.py --folder /tmp/demo

Makes a base model and three fine-tunes of it, merges them with every method as merge.py does it, loads a merge with
transformers, lets it write, and evaluates it on a few rows of the six benchmarks. The models are RANDOM: they have no skills, and what they write is noise. What there is
to see is the commands, what comes out of them, and how far each method moves the base. No network, no GPU.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import merge
from merging.methods import METHODS, get_method

FINE_TUNES = {"math": 0.02, "code": 0.03, "instruct": 0.05}
"""Name -> size of the task vector over the size of the base's weights."""
SHOWN = "dare_ties"
"""The method whose merge is shown in full; the others run with --quiet."""
PROMPT = "Merge the models"
DATA = Path(__file__).resolve().parent.parent / "tests" / "data" / "benchmarks"
MARKER = "random_models"
"""Name of a file that shows that a folder is the demo's own, to be overwritten."""


@dataclass(frozen=True)
class Row:
    """One line of the summary."""

    method: str
    seconds: float
    distance: float
    """|merged - base| / |base|, over all sampled weights."""


def make_models(folder: Path) -> None:
    """Save a random base and the random fine-tunes of it, with a tokenizer: 0.1 million parameters each, bfloat16."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([__doc__ or ""], vocab_size=320, show_progress=False, special_tokens=["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    base = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    for fine_tune, size in {"base": 0.0, **FINE_TUNES}.items():
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(base[name] + size * base[name].square().mean().sqrt() * noise)
        model.save_pretrained(folder / fine_tune)
        tokenizer.save_pretrained(folder / fine_tune)


def merge_with(method: str, folder: Path) -> Row:
    """Merge the models as the command line does, and read what the recipe file says of the result."""
    takes = get_method(method).max_models  # slerp goes to one model, nuslerp from one to another
    models = ",".join(str(folder / name) for name in list(FINE_TUNES)[:takes])
    arguments = ["--method", method, "--base_model", str(folder / "base"), "--models_to_merge", models]
    arguments += ["--save_path", str(folder / f"merged_{method}"), "--overwrite"]
    if method == SHOWN:
        print("\n" + shlex.join(["python", "merge.py", *arguments]) + "\n", flush=True)
    else:
        arguments.append("--quiet")
    started = time.monotonic()
    code = merge.main(arguments)
    if code:
        sys.exit(code)
    seconds = time.monotonic() - started
    recipe = json.loads((folder / f"merged_{method}" / "merge_recipe.json").read_text())
    return Row(method, seconds, recipe["report"]["all"]["merged_relative_norm"])


def write_text(folder: Path) -> str:
    """What the model in `folder` writes after PROMPT: at most 16 tokens, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :]))


def evaluate(merged: Path, results: Path) -> None:
    """Score a model on a few rows of each benchmark as the command line does; without a sandbox, not on code."""
    import evaluate_model
    from checkpoints.errors import InputError
    from evaluation.benchmarks import PAPER
    from evaluation.sandbox import probe

    names = list(PAPER)
    try:
        probe()
    except InputError as error:
        print(f"  humaneval and mbpp are left out: {error}")
        names = [name for name in names if name not in ("humaneval", "mbpp")]
    for old in results.parent.glob(f"{results.stem}.*"):
        old.unlink()
    arguments = ["--model", str(merged), "--benchmarks", ",".join(names), "--data_dir", str(DATA), "--limit", "1"]
    arguments += ["--dtype", "float32", "--n_gpu", "0", "--math_max_tokens", "32"]
    arguments += ["--save_path", str(results)]
    print("\n" + shlex.join(["python", "evaluate_model.py", *arguments]) + "\n", flush=True)
    code = evaluate_model.main(arguments)
    if code:
        sys.exit(code)


def format_table(rows: Sequence[Row]) -> str:
    """The summary, one line for each method."""
    lines = [f"{'method':<16} {'seconds':>8}  {'distance from base':>18}"]
    lines += [f"{row.method:<16} {row.seconds:>8.2f}  {row.distance:>18.4f}" for row in rows]
    return "\n".join(lines)


def run(folder: Path) -> None:
    """Everything, in order; prints as it goes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    (folder / ".gitignore").write_text("*\n")
    print(f"[1/4] Making a random base model and three random fine-tunes in {folder}. They have no skills.", flush=True)
    from transformers.utils import logging

    logging.disable_progress_bar()
    make_models(folder)
    print(f"[2/4] Merging them with each of the {len(METHODS)} methods.", flush=True)
    rows: dict[str, Row] = {}
    for method in sorted(METHODS, key=lambda name: name == SHOWN):
        print(f"  [{'#' * len(rows):.<{len(METHODS)}}] {method}", flush=True)
        rows[method] = merge_with(method, folder)
    merged = folder / f"merged_{SHOWN}"
    print(f"\n[3/4] Loading {merged} with transformers.", flush=True)
    print(f"  {PROMPT!r} goes on, as random models do, with {write_text(merged)!a}\n")
    print(
        f"[4/4] Evaluating {merged} on one row of each benchmark. Its answers are noise, and so are its scores.",
        flush=True,
    )
    evaluate(merged, folder / "results.json")
    print()
    print(format_table([rows[method] for method in METHODS]))
    print("\ndistance from base: |merged - base| / |base|")
    print(f"{merged} holds: " + ", ".join(sorted(path.name for path in merged.iterdir())))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="for the models and merges (default: demo)")
    folder = parser.parse_args(argv).folder
    if folder.exists() and not (folder / MARKER).exists() and any(folder.iterdir()):
        parser.error(f"--folder {folder}: holds something else. Choose a folder that is empty or not there.")
    run(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
