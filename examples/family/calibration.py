"""Write calibration text for AIM: training documents with another seed, of the pretraining mixture or of one field.

    PYTHONPATH=. python -m examples.family.calibration --out build/calibration
    python merge.py ... --omega 0.4 --calibration_data build/calibration/mixture.jsonl

With it goes nothing that is tested: all documents are of the train split.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.family.documents import Stage, documents

TEXTS: dict[str, Stage] = {"mixture": "pretrain", "code": "code", "math": "math", "instruct": "instruct"}
SEED = "calibration"


def write(folder: Path, count: int = 256) -> None:
    """Write one file of `count` texts for the mixture and for each field."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, stage in TEXTS.items():
        lines = [
            json.dumps({"text": document.prompt + document.completion}) for document in documents(stage, count, SEED)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write calibration text for AIM.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=256)
    arguments = parser.parse_args(argv)
    write(arguments.out, arguments.texts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
