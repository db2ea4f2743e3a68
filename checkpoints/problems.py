"""Everything that keeps a run from working, collected, so that a user mends it all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from checkpoints.errors import InputError, Refusals
from checkpoints.settings import Remark

Made = TypeVar("Made")


class Problems:
    """What is wrong, in the order in which it was found, each problem once; and what is only worth a warning or a note.

        problems = Problems()
        save_path = problems.attempt(read_save_path)  # None where it refuses
        with problems.collect():
            check_everything_else()
        problems.add("model.safetensors: expected 8 tensors, got 7. Download it again.")
        problems.raise_if_any()

    Attributes:
        found: the problems.
        notes: lines that stop nothing.
        warnings: such as nobody should miss.
    """

    def __init__(self, found: Iterable[str | InputError] = (), notes: Iterable[str] = ()):
        self.found: list[InputError] = []
        self.notes: list[str] = list(notes)
        self.warnings: list[str] = []
        self.extend(found)

    def __bool__(self) -> bool:
        return bool(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def __iter__(self) -> Iterator[InputError]:
        return iter(self.found)

    def add(self, problem: str | InputError) -> None:
        """Add a problem, or each of a refusal's, unless it is there already."""
        if isinstance(problem, Refusals):
            self.extend(problem.problems)
            return
        error = problem if isinstance(problem, InputError) else InputError(problem)
        if all(error.marked != there.marked for there in self.found):
            self.found.append(error)

    def extend(self, problems: Iterable[str | InputError]) -> None:
        """Add several."""
        for problem in problems:
            self.add(problem)

    def take(self, others: Problems) -> None:
        """Add the problems and the notes that were collected elsewhere."""
        self.extend(others)
        self.notes += others.notes
        self.warnings += others.warnings

    def warn(self, text: str) -> None:
        """Add a line that stops nothing and that nobody should miss."""
        self.warnings.append(Remark(text))

    def note(self, text: str) -> None:
        """Add a line that stops nothing."""
        self.notes.append(Remark(text))

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Add what the block refuses instead of raising it."""
        try:
            yield
        except InputError as error:
            self.add(error)

    def attempt(self, make: Callable[[], Made]) -> Made | None:
        """What `make` gives; None where it refuses, which is added."""
        with self.collect():
            return make()
        return None

    def raise_if_any(self) -> None:
        """Raise Refusals with everything found; nothing where nothing is wrong."""
        if self.found:
            raise Refusals(self.found)
