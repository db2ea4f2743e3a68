"""Everything that can be known before a model is loaded: what is missing or wrong is said all at once."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.errors import ArgumentError, InputError, Refusals
from checkpoints.location import Location, locate
from checkpoints.problems import Problems
from checkpoints.settings import Remark, setting
from evaluation.benchmarks import get_benchmark
from evaluation.benchmarks.contract import Benchmark, Response
from evaluation.data import Data, load_data
from evaluation.dataset_files import Missing
from evaluation.entries import describe_data
from evaluation.request import Request
from evaluation.responses import check_indices, read_responses
from evaluation.results import (
    check_resumable,
    check_save_path,
    default_path,
    drop_lost,
    read_results,
    responses_path,
)

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from evaluation.model import ModelOptions
    from evaluation.sandbox import Sandbox

NO_PUNKT = Remark(
    "nltk's punkt data is not there: IFEval splits sentences with a simple splitter, and is not comparable to the paper. "
    f"{setting('fetch_data')} {setting('benchmarks', 'ifeval')} fetches it."
)


@dataclass
class Prepared:
    """A request whose parts have been found and checked.

    Attributes:
        request: as given; `benchmarks` holds what is evaluated.
        save_path: of the results.
        benchmarks, data: by name.
        responses: given ones, by name; empty where they are generated.
        location, options: of the model; None where none is loaded.
        earlier: results to go on with.
        generated: results of the run that made the given responses, where they lie beside them.
        extra_tasks: lm_eval's manager that knows the extra tasks; None without any.
        sandbox: open; None where no program is run.
        punkt: folder with punkt's data, or None.
        notes: what a user should know, for standard error.
        resources: closes the sandbox.
    """

    request: Request
    save_path: Path
    benchmarks: dict[str, Benchmark]
    data: dict[str, Data]
    responses: dict[str, list[Response]]
    location: Location | None = None
    options: ModelOptions | None = None
    earlier: dict[str, Any] | None = None
    generated: dict[str, Any] | None = None
    extra_tasks: TaskManager | None = None
    sandbox: Sandbox | None = None
    punkt: str | None = None
    notes: list[str] = field(default_factory=list)
    resources: ExitStack = field(default_factory=ExitStack)


def prepare(request: Request) -> Prepared:
    """Find and check model, data, responses, sandbox and the place for the results.

    Raises: Refusals: everything that keeps the evaluation from running.
    """
    problems = Problems()
    path = request.save_path or default_path(_title(request))
    with problems.collect():
        check_save_path(path, resume=request.resume)
    responses: dict[str, list[Response]] = {}
    with problems.collect():
        responses = _given_responses(request)
    names = request.benchmarks or tuple(responses)
    prepared = Prepared(request, path, {name: get_benchmark(name) for name in names}, {}, responses)
    for benchmark in prepared.benchmarks.values():
        with problems.collect():
            _prepare_data(prepared, benchmark)
    if request.stage != "score":
        with problems.collect():
            _prepare_model(prepared)
        with problems.collect():
            prepared.extra_tasks = _load_extra_tasks(request.extra_tasks)
    if request.resume and not problems:
        with problems.collect():
            _prepare_resume(prepared)
    if not problems and prepared.location is not None and request.model is not None:
        with problems.collect():  # the weights of a hub model come when nothing else is wrong
            prepared.location = locate(request.model, quiet=request.quiet, trust_remote_code=request.trust_remote_code)
    if request.stage != "generate":
        with problems.collect():
            _prepare_graders(prepared)
    if problems:
        prepared.resources.close()
        raise Refusals(_with_command(list(problems), request.data_dir))
    prepared.generated = _generated_beside(request)
    return prepared


def _with_command(problems: list[InputError], folder: Path | None) -> list[InputError]:
    """The problems; where data is missing, the last of them with the command that fetches all of it."""
    missing = [at for at, problem in enumerate(problems) if isinstance(problem, Missing)]
    if missing:
        names = ",".join(problem.benchmark for problem in problems if isinstance(problem, Missing))
        words = ["python evaluate_model.py", setting("fetch_data"), setting("benchmarks", names)]
        command = " ".join(words + ([setting("data_dir", shlex.quote(str(folder)))] if folder else []))
        advice = f"Where there is a network, this fetches all that is missing: {command}"
        problems[missing[-1]] = InputError(f"{problems[missing[-1]].marked} {advice}")
    return problems


def _title(request: Request) -> str:
    if request.model is not None:
        return request.model.path.resolve().name if request.model.is_local else request.model.path_or_id
    return request.responses.name.partition(".")[0] if request.responses else "responses"


def _given_responses(request: Request) -> dict[str, list[Response]]:
    """The responses to grade; none where they are generated, whose file must not exist then."""
    path = request.responses
    if path is None:
        return {}
    if request.stage == "generate":
        if path.exists() and not request.resume:
            raise ArgumentError(
                f"{setting('responses', path)}: exists. Choose another file, or add {setting('resume')}."
            )
        return {}
    by_benchmark = read_responses(path, request.benchmarks or None)
    empty = [name for name, responses in by_benchmark.items() if not responses]
    if empty or not by_benchmark:
        what = f"responses of {', '.join(empty)}" if empty else "responses"
        raise InputError(f"{path}: expected {what}, got none.")
    return {name: responses[: request.limit] for name, responses in by_benchmark.items()}


def _prepare_data(prepared: Prepared, benchmark: Benchmark) -> None:
    """Read a benchmark's data, and see that given responses belong to it."""
    data = load_data(benchmark, prepared.request.data_dir)
    prepared.data[benchmark.name] = data
    if benchmark.name in prepared.responses and prepared.request.responses is not None:
        check_indices(prepared.request.responses, benchmark.name, prepared.responses[benchmark.name], len(data.rows))


def _prepare_model(prepared: Prepared) -> None:
    """Find the model and decide how to load it."""
    from evaluation import backends
    from evaluation.model import ModelOptions

    request = prepared.request
    assert request.model is not None
    location = locate(request.model, weights=False, quiet=request.quiet, trust_remote_code=request.trust_remote_code)
    label = str(request.model)
    gpus = 0 if request.n_gpu == 0 else backends.count_gpus()
    heads = backends.attention_heads(location.folder, label)
    backend = backends.choose_backend(request.backend, gpus)
    n_gpu = backends.choose_gpus(request.n_gpu, gpus, heads, backend)
    if request.settings.chat and not backends.has_chat_template(location.folder):
        raise ArgumentError(
            f"{setting('apply_chat_template')}: the tokenizer of {label} has no chat template. Leave the flag out, or add a "
            "chat_template to its tokenizer_config.json."
        )
    if request.settings.chat:
        from evaluation.chat_template import check_chat_template

        check_chat_template(location.folder, label, trust_remote_code=request.trust_remote_code)
    if location.note:
        prepared.notes.append(location.note)
    prepared.location = location
    prepared.options = ModelOptions(
        backend=backend,
        dtype=request.dtype,
        n_gpu=n_gpu,
        max_model_len=request.max_model_len,
        batch_size=request.batch_size,
        seed=request.seed,
        trust_remote_code=request.trust_remote_code,
    )


def _load_extra_tasks(names: Sequence[str]) -> TaskManager | None:
    if not names:
        return None
    from evaluation.extra_tasks import load_tasks

    return load_tasks(names)


def _prepare_resume(prepared: Prepared) -> None:
    prepared.earlier = read_results(prepared.save_path)
    folder = None if prepared.location is None else str(prepared.location.folder)
    data = {name: describe_data(data) for name, data in prepared.data.items()}
    check_resumable(prepared.save_path, prepared.earlier, prepared.request.settings_as_json(), folder, data)
    if prepared.request.stage != "score":
        lost = drop_lost(prepared.earlier)
        if lost:
            prepared.notes.append(
                f"{prepared.earlier['responses_file']}: does not have the responses of {', '.join(lost)} as the results say, which are made again."
            )


def _prepare_graders(prepared: Prepared) -> None:
    request = prepared.request
    graders = open_graders(
        list(prepared.benchmarks.values()), request.data_dir, prepared.resources,
        workers=request.workers, unsafe=request.unsafe_code_execution,
    )  # fmt: skip
    prepared.sandbox, prepared.punkt = graders.sandbox, graders.punkt
    prepared.notes += graders.notes


@dataclass(frozen=True)
class Graders:
    """What some benchmarks are graded with; see `Prepared`."""

    sandbox: Sandbox | None
    punkt: str | None
    notes: Sequence[str]


def open_graders(
    benchmarks: Sequence[Benchmark],
    data_dir: Path | None,
    resources: ExitStack,
    *,
    workers: int = 0,
    unsafe: bool = False,
) -> Graders:
    """Open the sandbox, which proves itself by a real run, and look for punkt's data, where they are needed.

    Args:
        resources: closes the sandbox.
        workers: processes; 0 for one per core.
        unsafe: run programs without a lock where none works.

    Raises: InputError: no sandbox works here.
    """
    notes: list[str] = []
    punkt: str | None = None
    sandbox: Sandbox | None = None
    if any(benchmark.name == "ifeval" for benchmark in benchmarks):
        from evaluation.grading.sentences import find_punkt

        punkt = find_punkt(data_dir)
        notes += [] if punkt is not None else [NO_PUNKT]
    if any(benchmark.runs_code for benchmark in benchmarks):
        from evaluation.sandbox import Sandbox

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = Sandbox(workers=workers or None, unsafe=unsafe)
        sandbox = resources.enter_context(made)
        notes += [str(warning.message) for warning in caught]
    return Graders(sandbox, punkt, notes)


def _generated_beside(request: Request) -> dict[str, Any] | None:
    """The results that `--stage generate` left beside a file of responses, where they are there."""
    if request.stage != "score" or request.responses is None:
        return None
    stem = request.responses.name.removesuffix(".responses.jsonl")
    beside = request.responses.with_name(stem + ".json")
    if responses_path(beside) != request.responses or not beside.is_file():
        return None
    try:
        return read_results(beside)
    except InputError:
        return None
