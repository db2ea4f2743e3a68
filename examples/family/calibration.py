"""Write calibration text for AIM: training documents with another seed, of the pretraining mixture or of one field; and noise.

    PYTHONPATH=. python -m examples.family.calibration --out build/calibration
    python merge.py ... --omega 0.4 --calibration_data examples/family/data/calibration/mixture.jsonl

No document is tested on: all are of the train split. `random` is random tokens, for comparison.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.family.documents import Stage, documents

TEXTS: dict[str, Stage] = {"mixture": "pretrain", "code": "code", "math": "math", "instruct": "instruct"}
SEED = "calibration"
COUNT = 256
RANDOM_TOKENS = 64
"""In each text of random tokens; about as many as documents have."""
TOKENIZER = Path(__file__).resolve().parent / "models" / "base" / "tokenizer.json"


def write(folder: Path, count: int = COUNT) -> None:
    """Write one file of `count` texts for the mixture, for each field, and for random tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {name: [d.prompt + d.completion for d in documents(stage, count, SEED)] for name, stage in TEXTS.items()}
    for name, lines in {**texts, "random": random_texts(count)}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))


def random_texts(count: int) -> list[str]:
    """Texts that decode from tokens drawn at random, each with the same chance."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    rng = random.Random(SEED)
    size = tokenizer.get_vocab_size()
    return [tokenizer.decode([rng.randrange(size) for _ in range(RANDOM_TOKENS)]) for _ in range(count)]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the text; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write calibration text for AIM.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=COUNT)
    arguments = parser.parse_args(argv)
    write(arguments.out, arguments.texts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
