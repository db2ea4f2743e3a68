"""What a benchmark is: rows of data -> lm_eval tasks (prompts) -> responses of a model -> grades -> metrics."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from evaluation.benchmarks.settings import Advance, Settings

if TYPE_CHECKING:
    from evaluation.grading.tools import Tools

Row = Mapping[str, Any]
Status = Literal["right", "wrong", "no_answer", "unanswered", "timeout", "forged", "error"]


@dataclass(frozen=True)
class Generation:
    """Greedy decoding of one benchmark: at most `max_new_tokens`, and up to the first of the stop strings or EOS."""

    max_new_tokens: int
    stop: tuple[str, ...]


@dataclass(frozen=True)
class HubDataset:
    """Where a benchmark lies on the hub: patterns of its files, relative to the repository, for each split."""

    repo: str
    splits: Mapping[str, str]


@dataclass(frozen=True)
class TaskRows:
    """Rows that share one lm_eval task.

    Attributes:
        config: for `lm_eval.api.task.ConfigurableTask`, without the data.
        rows: (index of the row in the benchmark's file, row).
    """

    config: dict[str, Any]
    rows: Sequence[tuple[int, Row]]


@dataclass(frozen=True)
class Response:
    """One answer, generated here or given.

    Attributes:
        index: 0-based row of the benchmark's data; several responses may name the same row.
        text: up to the first stop string; for a multiple choice its letter.
        finish: `stop`, `length` (the limit was reached), `no_room` (the prompt fills the window; text is empty), or `given`.
        prompt_tokens, new_tokens: None where the response was given.
        shortened: whether the window allowed fewer new tokens than the setting.
        loglikelihoods: of the choices, where there are choices.
        prompt: what the model was given, None where the response was.
    """

    index: int
    text: str
    finish: Literal["stop", "length", "no_room", "given"] = "given"
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    shortened: bool = False
    loglikelihoods: tuple[float, ...] | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class Grade:
    """What one response is worth.

    Attributes:
        score: in [0, 1], the item's share in the benchmark's score.
        status: `no_answer` where none can be read from the response, `unanswered` where the model was not asked.
        answer: what was taken from the response, where that is not the response itself.
        detail: a short reason for people.
        extra: what the benchmark's own metrics need.
    """

    score: float
    status: Status
    answer: str | None = None
    detail: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """A fraction, with the standard error that lm_eval's sample formula gives; None for a single item."""

    value: float
    stderr: float | None


class BadRow(ValueError):
    """A row of data is not what it should be. The message says what was expected and what was found."""


class Benchmark(ABC):
    """One benchmark; a subclass is a file of evaluation/benchmarks.

    Class attributes:
        name: as in --benchmarks.
        dataset: on the hub.
        files: names of plain .jsonl files in --data_dir, the first that exists is read; only the first is complete.
        fewshot_file: likewise for examples, where a benchmark reads its own.
        size: rows of the whole test set.
        shots: examples in the prompt, in the paper's setting.
        metric: what `score` is.
        choices: letters of a multiple choice that is answered by loglikelihood; empty where text is generated.
        harness: whether the paper's program ran it through lm_eval, which then added no BOS.
        runs_code: whether grading runs programs that a model wrote.
        grader: what decides, with its version in the results.
    """

    name: ClassVar[str]
    dataset: ClassVar[HubDataset]
    files: ClassVar[tuple[str, ...]]
    fewshot_file: ClassVar[str | None] = None
    size: ClassVar[int]
    shots: ClassVar[int] = 0
    metric: ClassVar[str] = "acc"
    choices: ClassVar[tuple[str, ...]] = ()
    harness: ClassVar[bool] = True
    runs_code: ClassVar[bool] = False
    grader: ClassVar[str] = "exact"
    notes: ClassVar[tuple[str, ...]] = ()
    """Deviations from the paper's program that leave the numbers comparable, for the results."""

    @abstractmethod
    def read_row(self, row: Row) -> dict[str, Any]:
        """The fields that are used, from any of the layouts. Raises BadRow."""

    @abstractmethod
    def tasks(
        self, rows: Sequence[tuple[int, Row]], settings: Settings, fewshots: Sequence[Row] = ()
    ) -> list[TaskRows]:
        """The lm_eval tasks that build the prompts; every row is in exactly one."""

    def generation(self, settings: Settings) -> Generation | None:
        """How text is generated; None where a choice is made by loglikelihood."""
        return None

    def reference(self, row: Row, settings: Settings) -> str | None:
        """A right answer, as it continues the prompt of these settings; None where the data has none. A benchmark with `choices`
        has it in its requests."""
        return None

    def uses_chat_template(self, settings: Settings) -> bool:
        """Whether the prompts of these settings are wrapped in the chat template."""
        return settings.chat

    def adds_no_bos(self, settings: Settings) -> bool:
        """Whether BOS is left out although the tokenizer adds one: what the paper's program did in its harness tasks."""
        return settings.profile == "paper" and self.harness

    def first(self, rows: Sequence[Row], limit: int) -> list[int]:
        """The rows that `--limit` keeps: the first ones; a benchmark sorted by subject takes them from all subjects."""
        return list(range(min(limit, len(rows))))

    @abstractmethod
    def grade(self, rows: Sequence[Row], responses: Sequence[Response], tools: Tools, advance: Advance) -> list[Grade]:
        """Grade responses, none of them `no_room`.

        Args:
            rows: the row of each response, aligned with `responses`.
            tools: worker processes, the sandbox, the settings.
            advance: call with numbers of responses as they are graded.
        """

    def unanswered(self, row: Row) -> Grade:
        """The grade of a row that the model was not asked."""
        return Grade(0.0, "unanswered", detail="the prompt leaves no room in the model's window")

    def metrics(self, grades: Sequence[Grade]) -> dict[str, Metric]:
        """Named metrics over all responses; the first one is the benchmark's score."""
        return {self.metric: mean([grade.score for grade in grades])}


def mean(values: Sequence[float]) -> Metric:
    """Mean and standard error: sd with n - 1, over the root of n, as lm_eval's `mean_stderr`."""
    count = len(values)
    average = math.fsum(values) / count
    if count < 2:
        return Metric(average, None)
    variance = math.fsum((value - average) ** 2 for value in values) / (count - 1)
    return Metric(average, math.sqrt(variance / count))


def until_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return min((text.partition(string)[0] for string in stop), key=len, default=text)


def spread(subjects: Sequence[str], limit: int) -> list[int]:
    """Indices of `limit` rows, the first of every subject, then the second of every subject and so on; sorted."""
    seen: dict[str, int] = {}
    ranks = []
    for index, subject in enumerate(subjects):
        rank = seen.get(subject, 0)
        seen[subject] = rank + 1
        ranks.append((rank, index))
    return sorted(index for _, index in sorted(ranks)[:limit])


def question_of(row: Row) -> str:
    """The text of a row, as `read_row` gives it, that is its question."""
    return str(next(row[name] for name in ("question", "prompt", "text") if name in row))


def text_field(row: Row, *names: str, empty: bool = False) -> str:
    """The first of the fields that the row has, a string. Raises BadRow where there is none, or it is empty and may not be."""
    for name in names:
        if name in row:
            value = row[name]
            if not isinstance(value, str) or not (value.strip() or empty):
                raise BadRow(f"expected text in '{name}', got {_short(value)}")
            return value
    raise BadRow(f"expected a field '{names[0]}', got {', '.join(map(str, row)) or 'none'}")


def list_field(row: Row, name: str, kind: type, length: int | None = None) -> list[Any]:
    """A list of one kind of value, maybe of a given length. Raises BadRow."""
    value = row.get(name)
    good = isinstance(value, list) and all(isinstance(item, kind) for item in value)
    if not good or not value or length not in (None, len(value)):
        count = "a list" if length is None else f"a list of {length}"
        raise BadRow(f"expected {count} of {kind.__name__} in '{name}', got {_short(value)}")
    return list(value)


def _short(value: object) -> str:
    return "none" if value is None else f"{value!r:.60}"
