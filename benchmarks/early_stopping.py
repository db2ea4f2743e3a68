"""What it changes that a calibration stops when it knows enough: held-out loss of the relaxed merge, tokens and processor time.

    python benchmarks/early_stopping.py --tolerances 0.02,0.1
    python benchmarks/early_stopping.py --real BASE --texts texts.jsonl --n_samples 1000

Three experts are summed up by task arithmetic and relaxed with omega 0, once on statistics of all of the text (tolerance 0), once on
those of as much as a tolerance takes. Losses are nats per answer token on documents that nothing was trained on; the
difference is paired by document, domains weigh the same, +- is one standard error.

Without --real: the tiny models of examples/family. With it: the adapters of examples/real on that base (`make real-base`).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aim.calibration_run import TOLERANCE
from benchmarks.measured import run as run_command

ROOT = Path(__file__).resolve().parent.parent
FAMILY = ROOT / "examples" / "family"
REAL = ROOT / "examples" / "real"
CALIBRATED = re.compile(r"calibrated on ([\d,]+) tokens in ([\d.]+) s")
Losses = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Case:
    """What is merged, and on what it is scored.

    Attributes:
        base: a folder.
        models: as merge.py takes them.
        texts: for calibration.
        documents: by domain, as token ids.
    """

    base: Path
    models: Sequence[str]
    texts: Path
    documents: Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Outcome:
    """One merge: tokens of its calibration and seconds it took, processor seconds of the whole run, and losses."""

    tokens: int
    seconds: float
    cpu_seconds: float
    losses: Losses


def family(count: int) -> Case:
    """The tiny models, on items of the first test set."""
    from transformers import AutoTokenizer

    from examples.family.benchmarks import items
    from examples.real.texts import Encoded

    models = FAMILY / "models"
    tokenizer: Any = AutoTokenizer.from_pretrained(models / "base")
    documents = {
        name: [
            Encoded(tokenizer(item.prompt).input_ids, tokenizer(item.answer, add_special_tokens=False).input_ids)
            for item in items(name, "test_0", count)
        ]
        for name in ("ifeval", "gsm8k", "humaneval")
    }
    experts = [str(models / name) for name in ("instruct", "math", "code")]
    return Case(models / "base", experts, FAMILY / "data" / "calibration" / "mixture.jsonl", documents)


def real(base: Path, count: int, folder: Path) -> Case:
    """The real base with the committed adapters, on their test texts, which are written into a folder."""
    from transformers import AutoTokenizer

    from examples.real.texts import read_encoded, write_domains

    write_domains(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    domains = sorted(one.name for one in (REAL / "adapters").iterdir() if one.is_dir())
    documents = {one: read_encoded(folder, one, "test", tokenizer, count) for one in domains}
    experts = [f"{base}+{REAL / 'adapters' / one}" for one in domains]
    return Case(base, experts, REAL / "calibration.jsonl", documents)


def score(folder: Path, documents: Mapping[str, Sequence[Any]]) -> dict[str, list[float]]:
    """Loss of every document."""
    import torch
    from transformers import AutoModelForCausalLM

    from examples.real.losses import score as score_documents

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return {domain: [one.loss for one in score_documents(model, ones)] for domain, ones in documents.items()}


def merged(case: Case, aim: Sequence[str], lambda_: float) -> Outcome:
    """Merge as a user does, and score."""
    with tempfile.TemporaryDirectory(prefix="stopping_") as place:
        out = Path(place) / "out"
        command = [sys.executable, str(ROOT / "merge.py"), "--method", "task_arithmetic", "--lambda", f"{lambda_:g}"]
        command += ["--base_model", str(case.base), "--models_to_merge", ",".join(case.models)]
        command += ["--dtype", "float32", "--report", "none", "--save_path", str(out), *aim]
        done = run_command(command)
        found = CALIBRATED.search(done.stdout)
        tokens, seconds = (int(found[1].replace(",", "")), float(found[2])) if found else (0, 0.0)
        return Outcome(tokens, seconds, done.cpu_seconds, score(out, case.documents))


def mean(losses: Losses) -> float:
    """Over documents, then over domains."""
    return statistics.mean(statistics.mean(ones) for ones in losses.values())


def difference(ours: Losses, theirs: Losses) -> tuple[float, float]:
    """Ours minus theirs, and its standard error."""
    pairs = [[a - b for a, b in zip(ours[one], theirs[one], strict=True)] for one in ours]
    variance = sum(statistics.variance(ones) / len(ones) for ones in pairs) / len(pairs) ** 2
    return statistics.mean(statistics.mean(ones) for ones in pairs), variance**0.5


def main() -> None:
    """Merge without AIM and with each tolerance, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, metavar="BASE", help="the real base, in place of the tiny models")
    parser.add_argument("--texts", type=Path, help="calibration text (default: that of the examples)")
    parser.add_argument("--n_samples", type=int, default=256, help="texts of it (256)")
    parser.add_argument("--block_size", type=int, default=512, help="tokens of a block (512)")
    parser.add_argument("--documents", type=int, default=64, help="of each domain that are scored (64)")
    parser.add_argument("--lambda", dest="lambda_", type=float, default=1.0, help="of task arithmetic (1)")
    parser.add_argument(
        "--tolerances", default=f"{TOLERANCE:g}", help="to stop at, with commas (the default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of the table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stopping_") as place:
        case = real(arguments.real, arguments.documents, Path(place)) if arguments.real else family(arguments.documents)
    flags = ["--omega", "0", "--calibration_data", str(arguments.texts or case.texts)]
    flags += ["--n_samples", str(arguments.n_samples), "--block_size", str(arguments.block_size)]
    rows = {"no AIM": merged(case, [], arguments.lambda_)}
    for tolerance in ("0", *arguments.tolerances.split(",")):
        rows[f"tolerance {tolerance}"] = merged(case, [*flags, "--calibration_tolerance", tolerance], arguments.lambda_)
    whole = rows["tolerance 0"].losses
    if arguments.json:
        kept = {
            name: {**vars(one), "losses": mean(one.losses), "difference": difference(one.losses, whole)}
            for name, one in rows.items()
        }
        print(json.dumps(kept))
        return
    print("| | tokens | seconds of calibration | processor seconds of the run | loss | minus that of tolerance 0 |")
    print("|---" * 6 + "|")
    for name, one in rows.items():
        change, error = difference(one.losses, whole)
        times = f"{one.tokens:,} | {one.seconds:.1f} | {one.cpu_seconds:.1f}"
        print(f"| {name} | {times} | {mean(one.losses):.4f} | {change:+.5f} +- {error:.5f} |")


if __name__ == "__main__":
    main()
