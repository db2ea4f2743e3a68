"""What to evaluate and how: the flags, checked against each other before anything is opened."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from checkpoints.errors import ArgumentError, unknown
from checkpoints.location import ModelName, parse_name
from checkpoints.problems import Problems
from checkpoints.settings import setting
from evaluation.benchmarks import BENCHMARKS, MATHS, PAPER
from evaluation.benchmarks.settings import Profile, Settings

Stage = Literal["generate", "score", "all"]
PROFILES = ("paper", "fixed")
STAGES = ("generate", "score", "all")
BACKENDS = ("auto", "vllm", "hf")
DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Request:
    """One evaluation.

    Attributes:
        model: None where given responses are scored.
        benchmarks: names, in the order of the paper's table; empty with `stage` score for all that the responses hold.
        extra_tasks: names of lm_eval tasks besides.
        settings: what prompts and limits depend on.
        backend, dtype, n_gpu, max_model_len, batch_size, seed, trust_remote_code: see `backends.ModelOptions`.
        limit: rows of each benchmark; None for all.
        data_dir: folder with the data; None for the hub.
        stage: generate, score or both.
        responses: file to read (score) or write (generate).
        save_path: results file; None for a default one.
        resume: go on with what `save_path` holds.
        log_samples: write each sample with its grade.
        unsafe_code_execution: run programs without a lock where none works.
        workers: processes that grade; 0 for one per core.
        quiet: no progress bars, notes or table.
        command: as typed, for the results.
    """

    model: ModelName | None = None
    benchmarks: tuple[str, ...] = PAPER
    extra_tasks: tuple[str, ...] = ()
    settings: Settings = field(default_factory=Settings)
    backend: str = "auto"
    dtype: str = "bfloat16"
    n_gpu: int | None = None
    max_model_len: int = 4096
    batch_size: int | None = None
    seed: int = 1234
    trust_remote_code: bool = False
    limit: int | None = None
    data_dir: Path | None = None
    stage: Stage = "all"
    responses: Path | None = None
    save_path: Path | None = None
    resume: bool = False
    log_samples: bool = True
    unsafe_code_execution: bool = False
    workers: int = 0
    quiet: bool = False
    command: Sequence[str] | None = None

    def settings_as_json(self) -> dict[str, Any]:
        """What a resumed run must agree with."""
        return {
            "profile": self.settings.profile,
            "apply_chat_template": self.settings.chat,
            "math_prompt_type": self.settings.math_prompt_type,
            "math_max_tokens": self.settings.math_max_tokens,
            "think_end": self.settings.think_end,
            "backend": self.backend,
            "dtype": self.dtype,
            "n_gpu": self.n_gpu,
            "max_model_len": self.max_model_len,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "limit": self.limit,
            "unsafe_code_execution": self.unsafe_code_execution,
        }


def make_request(
    *,
    model: str | None = None,
    benchmarks: str | None = None,
    math_benchmarks: str | None = None,
    mmlu_pro: bool = False,
    tasks_file: str | None = None,
    profile: str = "fixed",
    apply_chat_template: bool = False,
    math_prompt_type: str = "wcot",
    math_max_tokens: int = 1024,
    think_end: str | None = None,
    backend: str = "auto",
    dtype: str = "bfloat16",
    n_gpu: int | None = None,
    max_model_len: int = 4096,
    batch_size: str | int = "auto",
    limit: int | None = None,
    data_dir: str | None = None,
    stage: str = "all",
    responses: str | None = None,
    save_path: str | None = None,
    resume: bool = False,
    **rest: Any,
) -> Request:
    """A request from flags as they are typed; `rest` are fields of `Request` that need no reading.

    Raises: Refusals: everything that is wrong with the flags, at once.
    """
    problems = Problems()

    # Each value by itself.
    problems.attempt(lambda: _choice(setting("profile"), profile, PROFILES))
    problems.attempt(lambda: _choice(setting("backend"), backend, BACKENDS))
    problems.attempt(lambda: _choice(setting("dtype"), dtype, DTYPES))
    problems.attempt(lambda: _choice(setting("stage"), stage, STAGES))
    problems.attempt(lambda: _choice(setting("math_prompt_type"), math_prompt_type, _prompt_types()))
    for flag, number in (
        (setting("limit"), limit),
        (setting("max_model_len"), max_model_len),
        (setting("math_max_tokens"), math_max_tokens),
    ):
        if number is not None and number < 1:
            problems.add(ArgumentError(f"{flag}: expected a number above 0, got {number}."))
    if n_gpu is not None and n_gpu < 0:
        problems.add(ArgumentError(f"{setting('n_gpu')}: expected 0 (the CPU) or more, got {n_gpu}."))
    chosen = problems.attempt(lambda: choose_benchmarks(benchmarks, math_benchmarks, mmlu_pro, stage))
    names = PAPER if chosen is None else chosen
    tasks = (problems.attempt(lambda: read_tasks_file(Path(tasks_file))) if tasks_file else None) or ()
    if not names and not tasks and stage != "score":
        problems.add(
            ArgumentError(f"{setting('benchmarks')}: nothing is left to evaluate. Known: {', '.join(BENCHMARKS)}.")
        )
    if think_end is not None and not think_end.strip():
        problems.add(
            ArgumentError(
                f"{setting('think_end')}: expected the text that ends a thought, such as '</think>', got {think_end!r}. Leave it out to grade responses whole."
            )
        )
    # What they are together.
    if think_end is not None and tasks:
        problems.add(
            ArgumentError(
                f"{setting('think_end')}: lm_eval grades the tasks of {setting('tasks_file')} itself, thoughts and all. Evaluate them without {setting('think_end')}."
            )
        )
    problems.extend(_check_stage(stage, model, responses, resume, save_path, tasks))
    folder = Path(data_dir).expanduser() if data_dir else None
    if folder is not None and not folder.is_dir():
        problems.add(ArgumentError(f"{setting('data_dir', data_dir)}: no such folder."))
    request = Request(
        model=problems.attempt(lambda: parse_name(model)) if model is not None else None,
        benchmarks=names,
        extra_tasks=tasks,
        settings=Settings(cast(Profile, profile), apply_chat_template, math_prompt_type, math_max_tokens, think_end),
        backend=backend,
        dtype=dtype,
        n_gpu=n_gpu,
        max_model_len=max_model_len,
        batch_size=problems.attempt(lambda: _batch_size(batch_size)),
        limit=limit,
        data_dir=folder,
        stage=cast(Stage, stage),
        responses=Path(responses).expanduser() if responses else None,
        save_path=Path(save_path).expanduser() if save_path else None,
        resume=resume,
        **rest,
    )
    problems.raise_if_any()
    return request


def choose_benchmarks(
    benchmarks: str | None, math_benchmarks: str | None, mmlu_pro: bool, stage: str = "all"
) -> tuple[str, ...]:
    """The benchmarks that the three flags name, in the order of the paper's table.

    Args:
        benchmarks: comma-separated; None for the paper's six, or with `stage` score for all that the responses hold.
        math_benchmarks: where given, decides which of math and gsm8k run; empty for none.
        mmlu_pro: MMLU-Pro too.

    Raises: ArgumentError: a name that there is not.
    """
    if benchmarks is None and math_benchmarks is None and not mmlu_pro and stage == "score":
        return ()
    names = set(PAPER if benchmarks is None else _names(setting("benchmarks"), benchmarks, BENCHMARKS))
    if math_benchmarks is not None:
        names = names.difference(MATHS) | _names(setting("math_benchmarks"), math_benchmarks, MATHS)
    if mmlu_pro:
        names.add("mmlu_pro")
    return tuple(name for name in BENCHMARKS if name in names)


def read_tasks_file(path: Path) -> tuple[str, ...]:
    """Names of lm_eval tasks, one on each line; `#` begins a comment. Raises ArgumentError where it cannot be read."""
    try:
        lines = path.expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{setting('tasks_file', path)}: cannot be read: {error}.") from error
    return tuple(dict.fromkeys(name for line in lines if (name := line.partition("#")[0].strip())))


def _check_stage(
    stage: str, model: str | None, responses: str | None, resume: bool, save_path: str | None, tasks: Sequence[str]
) -> Problems:
    problems = Problems()
    if stage == "score":
        if responses is None:
            problems.add(
                ArgumentError(f"{setting('stage', 'score')}: needs {setting('responses')} FILE, the answers to grade.")
            )
        if tasks:
            problems.add(
                ArgumentError(
                    f"{setting('tasks_file')}: lm_eval's own tasks need a model. Leave out {setting('stage', 'score')}."
                )
            )
        if resume:
            problems.add(
                ArgumentError(
                    f"{setting('resume')}: goes on with generating. Leave it out with {setting('stage', 'score')}."
                )
            )
    elif model is None:
        problems.add(ArgumentError(f"{setting('model')}: expected the folder or the hub name of a model."))
    if stage == "all" and responses is not None:
        problems.add(
            ArgumentError(
                f"{setting('responses')}: goes with {setting('stage', 'score')} (to read) or {setting('stage', 'generate')} (to write)."
            )
        )
    if resume and save_path is None:
        problems.add(
            ArgumentError(f"{setting('resume')}: needs {setting('save_path')}, the results file to go on with.")
        )
    return problems


def _names(flag: str, text: str, known: Collection[str]) -> set[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ArgumentError(f"{flag}: {unknown('benchmark', name, known)}")
    return set(names)


def _choice(flag: str, text: str, choices: Collection[str]) -> str:
    if text not in choices:
        raise ArgumentError(f"{flag}: {unknown('value', text, choices)}")
    return text


def _batch_size(value: str | int) -> int | None:
    """A number above 0, or None for `auto`."""
    if value == "auto":
        return None
    try:
        size = int(value)
    except ValueError:
        size = 0
    if size < 1:
        raise ArgumentError(f"{setting('batch_size')}: expected auto or a number above 0, got {value!r}.")
    return size


def _prompt_types() -> Collection[str]:
    from evaluation.benchmarks.wcot import PROMPTS

    return PROMPTS
