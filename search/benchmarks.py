"""Benchmarks as tasks of a search: items split by content as texts are, asked of the model in memory and graded by evaluation's own
code, and their reference answers as texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from checkpoints.errors import InputError
from checkpoints.model import Model
from checkpoints.problems import Problems
from checkpoints.settings import setting
from checkpoints.source import dtype_name
from evaluation.benchmarks import get_benchmark
from evaluation.benchmarks.contract import Benchmark, question_of
from evaluation.benchmarks.settings import Settings
from evaluation.data import Data, load_data
from evaluation.model import ModelOptions
from evaluation.prepare import Graders, open_graders
from forward.skeleton import build_skeleton
from forward.tuning import threads
from merging.model_texts import tokenizer_of
from search.goals import ACCURACY
from search.texts import LEAST, LONGEST, Document, Texts, content_of, is_held_out

if TYPE_CHECKING:
    from evaluation.model import Model as AskedModel
    from evaluation.prompts import Request


@dataclass(frozen=True)
class Item:
    """One row of a benchmark, as a model is asked it.

    Attributes:
        benchmark: its name.
        request: prompt and choices.
        tokens: of the prompt.
    """

    benchmark: str
    request: Request
    tokens: int

    def __len__(self) -> int:
        return self.tokens

    def as_json(self) -> list[Any]:
        """What tells it from others."""
        return [self.benchmark, self.request.index, self.request.prompt]


Task = Sequence[Document] | Sequence[Item]


@dataclass
class Benchmarks:
    """What is asked of candidates beside texts.

    Attributes:
        benchmarks, data: by name.
        settings: what prompts and limits depend on.
        searched, held_out: task -> its items, or its reference answers as documents.
        held_out_keys: hashes of the questions held out.
        graders, resources: what grades, and what closes it.
    """

    settings: Settings
    benchmarks: dict[str, Benchmark] = field(default_factory=dict)
    data: dict[str, Data] = field(default_factory=dict)
    searched: dict[str, Task] = field(default_factory=dict)
    held_out: dict[str, Task] = field(default_factory=dict)
    held_out_keys: set[str] = field(default_factory=set)
    graders: Graders = field(default_factory=lambda: Graders(None, None, ()))
    resources: ExitStack = field(default_factory=ExitStack)

    @property
    def texts(self) -> Texts:
        """Its tasks."""
        return Texts(self.searched, self.held_out, held_out_keys=frozenset(self.held_out_keys))

    @property
    def asks(self) -> bool:
        """Whether a model has to answer items."""
        return any(task.startswith(ACCURACY) for task in self.searched)


def read_benchmarks(
    base: Model,
    names: Iterable[str],
    data_dir: Path | None,
    settings: Settings,
    *,
    scores: bool,
    asks: bool,
    share: float,
    documents: int,
) -> Benchmarks:
    """Read benchmarks, choose and split their rows by a hash of the question, and build the prompts.

    Args:
        base: whose tokenizer and chat template prompts are built with.
        data_dir: folder with the data; None for the hub.
        scores: whether the loss of reference answers is wanted, as the task of the benchmark's name.
        asks: whether answers are graded, as the task `accuracy:NAME`.
        share: of the rows held out.
        documents: rows of a benchmark on either side at most.

    Raises: Refusals: no data, too few rows, no reference answers, no sandbox, a chat template that fails.
    """
    problems, found = Problems(), Benchmarks(settings)
    for name in names:
        benchmark = found.benchmarks[name] = get_benchmark(name)
        with problems.collect():
            found.data[name] = load_data(benchmark, data_dir)
            if scores and benchmark.reference(found.data[name].rows[0], settings) is None:
                raise InputError(
                    f"{setting('benchmarks', name)}: has no reference answers, and so no loss. Search for {setting('goal', 'accuracy')}."
                )
    if asks and not problems:
        with problems.collect():
            found.graders = open_graders(list(found.benchmarks.values()), data_dir, found.resources)
            problems.notes.extend(found.graders.notes)
    try:
        problems.raise_if_any()
        model = _prompt_builder(base, settings)
        for name, benchmark in found.benchmarks.items():
            sides = _split(found.data[name], share, documents)
            if min(map(len, sides)) < LEAST:
                problems.add(
                    InputError(
                        f"{setting('benchmarks', name)}: expected at least {LEAST} rows on either side, got {len(sides[0])} to search with and "
                        f"{len(sides[1])} held out. Give more rows, or another {setting('held_out')}."
                    )
                )
                continue
            keys = (content_of(question_of(found.data[name].rows[index])) for index in sides[True])
            found.held_out_keys.update(keys)
            with problems.collect():
                for side, indices in zip((found.searched, found.held_out), sides, strict=True):
                    _fill(side, model, benchmark, found.data[name], indices, settings, scores=scores, asks=asks)
        problems.raise_if_any()
    except BaseException:
        found.resources.close()
        raise
    return found


def _split(data: Data, share: float, documents: int) -> tuple[list[int], list[int]]:
    """Indices of the rows searched with, and of those held out: the same question is on one side, the same row counts once."""
    rows: dict[str, tuple[str, int]] = {}
    for index, row in enumerate(data.rows):
        rows.setdefault(json.dumps(row, sort_keys=True), (content_of(question_of(row)), index))
    sides: tuple[list[int], list[int]] = ([], [])
    for key, index in sorted(rows.values()):
        side = sides[is_held_out(key, share)]
        if len(side) < documents:
            side.append(index)
    return sides


def _fill(
    side: dict[str, Task], model: AskedModel, benchmark: Benchmark, data: Data, indices: Sequence[int], settings: Settings,
    *, scores: bool, asks: bool,
) -> None:  # fmt: skip
    """Add a benchmark's tasks to one side."""
    from evaluation.asking import build
    from evaluation.generation import check_bos

    requests = build(model, benchmark, data, indices, settings, lambda count: None)
    check_bos(model, requests[0].prompt)
    prompts = [list(model.lm.tok_encode(request.prompt)) for request in requests]
    if asks:
        side[ACCURACY + benchmark.name] = [
            Item(benchmark.name, request, len(ids)) for request, ids in zip(requests, prompts, strict=True)
        ]
    if scores:
        answers = (_reference(benchmark, data, request, settings) for request in requests)
        read = [
            Document(
                tuple(model.lm.tok_encode(request.prompt + text))[:LONGEST],
                max(1, len(ids)),
                {"text": request.prompt + text},
            )
            for request, ids, text in zip(requests, prompts, answers, strict=True)
        ]
        side[benchmark.name] = [document for document in read if document.scored > 0]


def _reference(benchmark: Benchmark, data: Data, request: Request, settings: Settings) -> str:
    """The right answer as it continues the prompt; of a choice as the harness writes it."""
    reference = benchmark.reference(data.rows[request.index], settings)
    assert reference is not None
    if benchmark.choices:
        return str(request.instances[benchmark.choices.index(reference)].args[1])
    return reference


def _prompt_builder(base: Model, settings: Settings) -> AskedModel:
    """The base without weights, which can build prompts and count their tokens. Raises InputError: no chat template."""
    tokenizer = tokenizer_of(base)
    if settings.chat and not tokenizer.chat_template:
        raise InputError(
            f"{setting('apply_chat_template')}: the tokenizer of {base.label} has no chat template. Leave it out."
        )
    return _asked(base, build_skeleton(base, torch.float32), tokenizer)


def _asked(base: Model, loaded: Any, tokenizer: Any) -> AskedModel:
    """A model of transformers as evaluation asks one."""
    import logging

    from evaluation.backends import wrap

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    options = ModelOptions("hf", dtype_name(loaded.dtype), n_gpu=int(loaded.device.type == "cuda"))
    return wrap(loaded, tokenizer, base.label, options)


class Examiner:
    """Asks the model in memory items of benchmarks, and grades what it answers.

    Args:
        base: whose tokenizer it has.
        loaded: the model, whose weights may change between calls.
        benchmarks: what is asked, and what grades.
        count: threads of torch.
    """

    def __init__(self, base: Model, loaded: Any, benchmarks: Benchmarks, count: int):
        from evaluation.grading.tools import Tools

        self._model = _asked(base, loaded, tokenizer_of(base))
        self._benchmarks, self._threads = benchmarks, count
        graders = benchmarks.graders
        tools = Tools(benchmarks.settings, 0, graders.sandbox, graders.punkt)
        self._tools = benchmarks.resources.enter_context(tools)

    def score(self, items: Sequence[Item]) -> list[float]:
        """What each answer is worth, in [0, 1], in the order of the items."""
        from evaluation.asking import answer, grade

        by_name: dict[str, list[int]] = {}
        for number, item in enumerate(items):
            by_name.setdefault(item.benchmark, []).append(number)
        found: dict[int, float] = {}
        for name, numbers in by_name.items():
            benchmark, data = self._benchmarks.benchmarks[name], self._benchmarks.data[name]
            settings = self._benchmarks.settings
            requests = [items[number].request for number in numbers]
            with threads(self._threads):
                responses = answer(self._model, benchmark, requests, settings, lambda count: None)
            grades = grade(benchmark, data, responses, settings, self._tools, lambda count: None)
            found |= {number: one.score for number, one in zip(numbers, grades, strict=True)}
        return [found[number] for number in range(len(items))]
