"""An evaluation from request to results: generate and grade, one benchmark after the other, the results written after each."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.errors import InputError, Interrupted
from checkpoints.settings import setting
from evaluation.asking import answer, build, grade
from evaluation.benchmarks.contract import Benchmark, Grade, Response, Row
from evaluation.benchmarks.settings import Settings
from evaluation.data import Data
from evaluation.entries import Asked, describe_grader, generated_entry, given_entry, graded, responses_sha256
from evaluation.grading.tools import Tools
from evaluation.prepare import Prepared, prepare
from evaluation.progress import item_bar
from evaluation.provenance import CheckpointDigests, environment
from evaluation.request import Request
from evaluation.responses import read_responses, to_lines
from evaluation.results import (
    new_results,
    now,
    replace_benchmark,
    responses_path,
    samples_path,
    update_summary,
    write_results,
)
from evaluation.thinking import describe_thinking

if TYPE_CHECKING:
    from evaluation.model import Model


@dataclass(frozen=True)
class Outcome:
    """What an evaluation left: the results, and the file they are in."""

    results: dict[str, Any]
    save_path: Path


def evaluate(request: Request) -> Outcome:
    """Evaluate a model, or grade given responses.

    Args:
        request: from `make_request`.

    Raises:
        Refusals: something is missing or wrong, before a model is loaded and before anything is written.
        InputError: the model cannot be loaded or runs out of memory, or the disk fails; the results so far are kept.
    """
    return run(prepare(request))


def run(prepared: Prepared) -> Outcome:
    """Carry out what has been prepared; see `evaluate`."""
    job = _Job(prepared)
    with prepared.resources:
        try:
            job.run()
        except KeyboardInterrupt:
            done = list(job.results["benchmarks"])
            kept = (
                f"{prepared.save_path} holds {', '.join(done)}; add {setting('resume')} to go on"
                if done
                else "nothing is finished"
            )
            raise Interrupted(f"interrupted; {kept}.") from None
    return Outcome(job.results, prepared.save_path)


class _Job:
    """A run under way: its results so far, and the tools it holds."""

    def __init__(self, prepared: Prepared):
        self.prepared = prepared
        self.request = prepared.request
        self.path = prepared.save_path
        self.results = prepared.earlier or new_results(
            stage=self.request.stage,
            settings=self._settings_to_record(),
            limit=self.request.limit,
            wanted=[],
            command=list(self.request.command) if self.request.command else None,
        )
        self.results["stage"] = self.request.stage
        if self.results["responses_file"] is None:
            self.results["responses_file"] = str(self.request.responses or responses_path(self.path))
        self.results["wanted"] = list(dict.fromkeys([*self.results["benchmarks"], *prepared.benchmarks]))
        self.settings = _settings_of(self.results["settings"])

    def _settings_to_record(self) -> dict[str, Any]:
        """The request's; where the run that made the given responses is known its own, but for a mark given now."""
        own = self.request.settings_as_json()
        generated = (self.prepared.generated or {}).get("settings")
        if not generated:
            return own
        return {**generated, **({"think_end": own["think_end"]} if own["think_end"] is not None else {})}

    def run(self) -> None:
        """Do what the stage asks for."""
        with Tools(self.settings, self.request.workers, self.prepared.sandbox, self.prepared.punkt) as tools:
            if self.request.stage == "score":
                self._score_given(tools)
            else:
                self._evaluate_model(tools)
        self.results["finished"] = now()
        self._write()

    def _score_given(self, tools: Tools) -> None:
        generated = self.prepared.generated or {"benchmarks": {}, "model": None}
        self.results["model"] = generated["model"]
        for name, responses in self.prepared.responses.items():
            benchmark, data = self.prepared.benchmarks[name], self.prepared.data[name]
            entry = generated["benchmarks"].get(name)
            if entry is None or entry["responses_sha256"] != responses_sha256(responses):
                entry = given_entry(benchmark, data, responses)
            self.results["benchmarks"][name] = entry
            self._grade(benchmark, data, responses, tools)

    def _evaluate_model(self, tools: Tools) -> None:
        prepared = self.prepared
        assert prepared.location is not None
        assert prepared.options is not None
        wanted_score = self.request.stage == "all"
        entries = self.results["benchmarks"]
        # What is left to do: a resumed run has some of it.
        to_ask = [name for name in prepared.benchmarks if name not in entries]
        to_grade = [name for name in prepared.benchmarks if wanted_score and entries.get(name, {}).get("score") is None]
        extra = [name for name in self.request.extra_tasks if name not in self.results["extra_tasks"]]
        if not (to_ask or to_grade or extra):
            return
        digests = CheckpointDigests(prepared.location)
        if self.results["model"] is not None and self.results["model"]["files"] != digests.as_json()["files"]:
            raise InputError(
                f"{setting('resume')}: the files of {prepared.location.name} have changed since. Begin with a new {setting('save_path')}."
            )
        # The model is loaded only where something is asked of it.
        model: Model | None = None
        if to_ask or extra:
            from evaluation.backends import load_model

            model = load_model(prepared.location.folder, str(prepared.location.name), prepared.options)
            self.results["environment"] = environment()
        # Ask, write, grade, write: one benchmark after the other.
        for name, benchmark in prepared.benchmarks.items():
            data = prepared.data[name]
            if name in to_ask:
                assert model is not None
                responses, asked = self._ask(model, benchmark, data)
                entries[name] = generated_entry(benchmark, self.settings, data, responses, asked)
                replace_benchmark(self._responses_file, name, to_lines(name, responses))
                self.results["model"] = digests.as_json()
                self._write()
            elif name in to_grade:
                responses = read_responses(self._responses_file, [name])[name]
                if responses_sha256(responses) != entries[name]["responses_sha256"]:
                    raise InputError(f"{self._responses_file}: {name}: expected the responses of this run, got others.")
            if name in to_grade:
                self._grade(benchmark, data, responses, tools)
        if model is not None and prepared.extra_tasks is not None and extra:
            from evaluation.chat_template import confined
            from evaluation.extra_tasks import run_tasks

            with confined(model.label):
                self.results["extra_tasks"] |= run_tasks(
                    model,
                    extra,
                    prepared.extra_tasks,
                    limit=self.request.limit,
                    chat=self.settings.chat,
                    seed=self.request.seed,
                )

    def _ask(self, model: Model, benchmark: Benchmark, data: Data) -> tuple[list[Response], Asked]:
        """Have the model answer a benchmark."""
        from evaluation.generation import check_bos
        from evaluation.prompts import prompts_sha256

        started = time.monotonic()
        chosen = _chosen_rows(benchmark, data.rows, self.request.limit)
        with item_bar(f"{benchmark.name}: preparing", len(chosen), quiet=self.request.quiet) as advance:
            requests = build(model, benchmark, data, chosen, self.settings, advance)
        bos = check_bos(model, requests[0].prompt)
        with item_bar(f"{benchmark.name}: generating", len(requests), quiet=self.request.quiet) as advance:
            responses = answer(model, benchmark, requests, self.settings, advance)
        # How they were asked.
        template = model.lm.tokenizer.chat_template if benchmark.uses_chat_template(self.settings) else None
        asked = Asked(
            prompts_sha256=prompts_sha256(requests),
            bos=bos,
            chat_template_sha256=None if template is None else hashlib.sha256(str(template).encode()).hexdigest(),
            dtype=model.dtype,
            backend=model.backend,
            n_gpu=model.options.n_gpu,
            window=model.window,
            batch_size=model.batch_size,
            ignored=model.ignored,
            seconds=time.monotonic() - started,
        )
        return responses, asked

    def _grade(self, benchmark: Benchmark, data: Data, responses: Sequence[Response], tools: Tools) -> None:
        """Grade a benchmark whose entry waits for it, and write what came of it."""
        started = time.monotonic()
        answered = sum(response.finish != "no_room" for response in responses)
        with item_bar(f"{benchmark.name}: grading", answered, quiet=self.request.quiet) as advance:
            grades = grade(benchmark, data, responses, self.settings, tools, advance)
        mark, generation = self.settings.think_end, benchmark.generation(self.settings)
        stop = () if generation is None else generation.stop
        sandbox = self.prepared.sandbox
        grader = describe_grader(
            benchmark,
            sandbox_level=None if sandbox is None else sandbox.level.value,
            punkt=self.prepared.punkt is not None,
        )
        entry = self.results["benchmarks"][benchmark.name]
        seconds = time.monotonic() - started
        self.results["benchmarks"][benchmark.name] = graded(
            entry,
            benchmark,
            self.settings,
            grades,
            grader=grader,
            thinking=describe_thinking(responses, mark, stop),
            seconds=seconds,
        )
        if self.request.log_samples:
            replace_benchmark(samples_path(self.path), benchmark.name, sample_lines(benchmark.name, responses, grades))
        self._write()

    @property
    def _responses_file(self) -> Path:
        return Path(self.results["responses_file"])

    def _write(self) -> None:
        update_summary(self.results)
        write_results(self.path, self.results)


def sample_lines(name: str, responses: Sequence[Response], grades: Sequence[Grade]) -> str:
    """Each response with its grade, as JSON Lines; every line is one of a responses file too."""
    lines = []
    for line, given in zip(to_lines(name, responses, prompts=True).splitlines(), grades, strict=True):
        judged = {"score": given.score, "status": given.status, "answer": given.answer, "detail": given.detail}
        extra = {"checks": dict(given.extra)} if given.extra else {}
        lines.append(json.dumps({**json.loads(line), **judged, **extra}))
    return "\n".join(lines) + "\n"


def _chosen_rows(benchmark: Benchmark, rows: Sequence[Row], limit: int | None) -> list[int]:
    return list(range(len(rows))) if limit is None else benchmark.first(rows, limit)


def _settings_of(settings: dict[str, Any]) -> Settings:
    """The settings that prompts and graders depend on, from the results' own record of them."""
    return Settings(
        settings["profile"],
        settings["apply_chat_template"],
        settings["math_prompt_type"],
        settings["math_max_tokens"],
        settings.get("think_end"),
    )
