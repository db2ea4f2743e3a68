"""The weights of a model: a source, and the files that it is read from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from checkpoints.reader import WeightFile
from checkpoints.sidecars import SideFiles
from checkpoints.source import Source


class Weights(Source, Protocol):
    """The tensors of a model, and the files they come from.

    Attributes:
        modules: what is stored beside them, of modules behind the model; see `Checkpoint`.
    """

    folder: Path
    files: Sequence[WeightFile]
    modules: Source

    @property
    def is_here(self) -> bool:
        """Whether its numbers can be read: False where only the headers of a hub model were."""
        ...

    def adjust(self, files: SideFiles) -> None:
        """Make a model's side files say what its tensors are, where they are others than its files hold."""
        ...

    def check_unchanged(self) -> None:
        """Raise InputError where a file is not the one that was opened."""
        ...

    def close(self) -> None:
        """Close every file; reading afterwards is an error."""
        ...
