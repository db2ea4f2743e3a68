"""The files of a dataset's repository, wherever a copy of it lies."""

from __future__ import annotations

from pathlib import Path

from checkpoints.errors import InputError
from evaluation.benchmarks.contract import HubDataset

REVISIONS_FILE = "revisions.json"


class Missing(InputError):
    """A benchmark's data is not there.

    Args:
        benchmark: its name.
        message: what was looked for, and where.
    """

    def __init__(self, benchmark: str, message: str):
        super().__init__(f"{benchmark}: {message}")
        self.benchmark = benchmark


def find_split(root: Path, pattern: str) -> list[Path]:
    """The files of one split in a copy of a dataset's repository, sorted; pattern as in `HubDataset.splits`."""
    return sorted(path for path in root.glob(pattern) if path.is_file())


def missing_splits(root: Path, dataset: HubDataset) -> list[str]:
    """The patterns of a dataset that no file in a copy matches."""
    return [pattern for pattern in dataset.splits.values() if not find_split(root, pattern)]
