"""What the commands share: flags that mean the same everywhere, how a run is carried out, exit codes, progress."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints import VERSION
from checkpoints.chat_templates import known_templates
from checkpoints.errors import ArgumentError, InputError, Refusals
from checkpoints.process import Launch, launch_of, own_process
from checkpoints.screen import discard, flush_all, open_closed_streams, shown_safely
from checkpoints.screen import say as say_on_stderr
from checkpoints.settings import setting, shown
from commands.command_line import Group, Parser, parse_choice, parse_save_path, parse_size, positive, show_flag

if TYPE_CHECKING:
    import torch

    from checkpoints.problems import Problems
    from checkpoints.upload import Upload
    from streaming.console import Console
    from streaming.job import Job, Result
    from streaming.log import Log
    from streaming.output import RunOptions, Written
    from streaming.processes import Processes

INTERRUPTED = 130
LESS_MEMORY = "Use fewer --workers, or --device cpu."
OWN_CODE = "Python code that comes with a model, or a method of your own that a recipe file names,"


def run(parser: Parser, body: Callable[[argparse.Namespace], None], argv: Sequence[str] | None) -> int:
    """Parse, run `body`, and turn what a user can cause into one message and an exit code: 0, 1 (failed), 2 (bad arguments)."""
    open_closed_streams()
    try:
        return _run(parser, body, argv)
    finally:
        flush_all()


def _run(parser: Parser, body: Callable[[argparse.Namespace], None], argv: Sequence[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show is escaped: bytes of a path that are no text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with own_process(), shown_safely():
            body(parser.parse(argv))
            sys.stdout.flush()
    except InputError as error:
        say_on_stderr(f"{parser.prog}: {error.shown(show_flag)}")
        return error.exit_code
    except KeyboardInterrupt:
        say_on_stderr(f"{parser.prog}: interrupted; nothing is left behind.")
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone, and the interpreter would flush once more at its end
        discard(sys.stdout)
        return 1
    except MemoryError:
        say_on_stderr(f"{parser.prog}: too little memory. {LESS_MEMORY}")
        return 1
    except RuntimeError as error:  # torch's own way to say it, on the CPU and on a GPU
        if not re.search(r"out of memory|not enough memory|can't allocate memory", str(error)):
            raise
        say_on_stderr(f"{parser.prog}: too little memory. {LESS_MEMORY}")
        return 1
    except OSError as error:  # a disk or a folder that no check could foresee
        say_on_stderr(f"{parser.prog}: {error.filename or 'the system'}: {error.strerror or error}.")
        return 1
    return 0


def command(parser: Parser, argv: Sequence[str] | None) -> list[str]:
    """The command as it was typed, for model cards: `python merge.py ...`."""
    return ["python", parser.prog, *(sys.argv[1:] if argv is None else argv)]


def add_output_flags(parser: Parser, *, dtype_of: str = "the base") -> None:
    """The flags of every command that writes a checkpoint, by default in the dtype of a model that `dtype_of` names."""
    output = parser.add_argument_group("output")
    output.add_argument(
        "--dtype",
        default="auto",
        metavar="DTYPE",
        help=f"auto (as stored in {dtype_of}; default), float32, bfloat16 or float16",
    )
    output.add_argument(
        "--max_shard_size",
        default="5GB",
        metavar="SIZE",
        help="largest weight file, such as 500MB or 5GB (default 5GB)",
    )
    output.add_argument(
        "--digest", default="outputs", metavar="WHAT",
        help="digests in merge_recipe.json: none, outputs (default; taken as they are written) or full (reads local inputs once more)",
    )  # fmt: skip
    output.add_argument("--digest_hash", default="blake3", metavar="NAME", help="with which hash they are taken: blake3 (default; fast on every processor) or sha256")  # fmt: skip
    output.add_argument(
        "--overwrite",
        action="store_true",
        common=True,
        help="replace SAVE_PATH where it holds an earlier result, and so the repo of --push_to_hub",
    )
    output.add_argument("--no_resume", action="store_true", help="begin anew where an interrupted run left something to go on with")  # fmt: skip
    add_hub_flags(output, "; each checkpoint of a sweep to NAME-omega_0.2 and so on")
    running = parser.add_argument_group("running")
    running.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="cpu, cuda or cuda:1, for all of it; auto (default): a GPU where there is one for what runs models, the CPU for merging, which is faster than the way to a GPU and back",
    )
    running.add_argument(
        "--workers", type=positive, metavar="N", help="threads (default: one per core); the result is the same"
    )
    add_running_flags(running, code=OWN_CODE)
    running.add_argument("--processes", type=positive, metavar="N", help="with --dry_run: what each of N processes under torchrun would read, write, hold in memory, and how long it would take")  # fmt: skip
    running.add_argument("--process_timeout", type=positive, default=300, metavar="S", help="under torchrun: seconds after which a process that gives no sign of life ends the run (default 300)")  # fmt: skip
    running.add_argument("--log_file", metavar="FILE", help="append to FILE, as JSON Lines: the plan, each tensor with its time and change, warnings, the end")  # fmt: skip
    running.add_argument("--allow_non_finite", action="store_true", help="let NaN and infinity through, from inputs and by overflow, and say where they are")  # fmt: skip


def add_running_flags(
    group: Group,
    *,
    code: str = "Python code that comes with a model",
    dry_run: str = "print the plan or every refusal; write nothing",
    plan: str = "the plan",
) -> None:
    """The flags of every command that plans before it runs.

    Args:
        code: what may run under `--trust_remote_code`.
        dry_run: what `--dry_run` does.
        plan: what it prints as JSON.
    """
    group.add_argument("--trust_remote_code", action="store_true", help=f"let {code} run (default: off)")
    group.add_argument("--dry_run", common=True, action="store_true", help=dry_run)
    group.add_argument("--json", action="store_true", help=f"with --dry_run: {plan} as JSON")
    group.add_argument("--quiet", action="store_true", help="print warnings and errors only")


def add_layout_flags(group: Group) -> None:
    """The flags of what a checkpoint with another vocabulary or head than its base's looks like."""
    group.add_argument("--new_token_rows", metavar="R", help="rows of a token that a model lacks: owner (the row of the first model that has it), owners_mean (the mean of the rows of all that have it; default where several do) or mean (of the model's own rows)")  # fmt: skip
    group.add_argument("--tie_word_embeddings", metavar="YES|NO", help="whether the output's head is its embedding (default: as in the model that gives its config)")  # fmt: skip
    group.add_argument("--chat_template", metavar="T", help=f"the output's chat template: {', '.join(known_templates())}, a Jinja file, or auto, the one that most inputs have (default: as the tokenizer has it)")  # fmt: skip
    group.add_argument("--copy_tokenizer_from", metavar="MODEL", help="tokenizer files and chat template of any model with the output's vocabulary, in place of the output's")  # fmt: skip
    group.add_argument("--allow_config_difference", metavar="KEYS", help="entries of config.json, separated by commas, in which models may differ from the one whose config the output has (default: heads must be the same; the rest is warned of)")  # fmt: skip


def parse_device(text: str) -> torch.device | None:
    """The device of `--device`, None for auto. Raises ArgumentError where there is no such device."""
    import torch

    if text == "auto":
        return None
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise ArgumentError(f"--device: expected auto, cpu, cuda or cuda:N, got {text!r}.")
    device = torch.device(text)
    gpus = torch.cuda.device_count()
    if text == "cuda" and gpus and (launch := launch_of(os.environ)) is not None:
        return _own_gpu(launch)
    if device.type == "cuda" and (device.index or 0) >= gpus:
        there = f"cuda:0 to cuda:{gpus - 1}" if gpus else "no GPU that torch can use"
        raise ArgumentError(f"--device: {text}: there is {there} here. Use --device {'cuda' if gpus else 'cpu'}.")
    return device


def gpu_or_cpu() -> torch.device:
    """Where heavy work goes by itself: a GPU where there is one."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    launch = launch_of(os.environ)
    return torch.device("cuda") if launch is None else _own_gpu(launch)


def device_of_models(device: torch.device | None) -> torch.device | None:
    """Where models run: where the flags say, else on a GPU of one's own where several processes share a machine; None for all GPUs."""
    return gpu_or_cpu() if device is None and launch_of(os.environ) is not None else device


def is_first() -> bool:
    """Whether this process is alone, or the first of several that were started together."""
    launch = launch_of(os.environ)
    return launch is None or launch.rank == 0


def _own_gpu(launch: Launch) -> torch.device:
    """The GPU of one of several processes on a machine: one each, in turns where there are more processes than GPUs."""
    import torch

    return torch.device("cuda", launch.local_rank % torch.cuda.device_count())


def add_hub_flags(group: Group, more: str = "") -> None:
    """The flags that push what was written; `more`: ends the help of the first."""
    group.add_argument("--push_to_hub", metavar="NAME", help=f"when it is complete, push it to the repo NAME or USER/NAME of the Hugging Face hub, a private one{more}")  # fmt: skip
    group.add_argument("--public", action="store_true", help="with --push_to_hub: a repo that everybody can see")


def check_public(arguments: argparse.Namespace) -> None:
    """Raise ArgumentError where `--public` stands alone."""
    if arguments.public and arguments.push_to_hub is None:
        raise ArgumentError("--public: nothing is pushed. Add --push_to_hub NAME, or leave it out.")


def read_run(
    arguments: argparse.Namespace, command: list[str], problems: Problems
) -> tuple[torch.device | None, RunOptions | None, Path | None]:
    """The device that was asked for, if one was, options and save path of a run; what is wrong is added to the problems."""
    import torch

    device = problems.attempt(lambda: parse_device(arguments.device))
    options = problems.attempt(lambda: run_options(arguments, device or torch.device("cpu"), command))
    return device, options, problems.attempt(lambda: parse_save_path(arguments.save_path))


def run_options(arguments: argparse.Namespace, device: torch.device, command: list[str]) -> RunOptions:
    """The run that the flags of `add_output_flags` ask for. Raises ArgumentError where one is wrong."""
    from streaming.output import RunOptions
    from streaming.stream import StreamOptions

    check_public(arguments)
    launch = launch_of(os.environ)
    workers = arguments.workers
    if workers is None and launch is not None:  # the processes of a machine share its cores
        from streaming.workers import available_cores

        workers = max(1, available_cores() // launch.local_size)
    return RunOptions(
        stream=StreamOptions(device, workers, allow_non_finite=arguments.allow_non_finite),
        max_shard_bytes=parse_size("max_shard_bytes", arguments.max_shard_size),
        digest=parse_choice("digest", arguments.digest, ("none", "outputs", "full")),  # type: ignore[arg-type]
        digest_hash=parse_choice("digest_hash", arguments.digest_hash, ("blake3", "sha256")),  # type: ignore[arg-type]
        overwrite=arguments.overwrite,
        resume=not arguments.no_resume,
        trust_remote_code=arguments.trust_remote_code,
        quiet=arguments.quiet,
        command=command,
    )


def read_upload(arguments: argparse.Namespace, folders: Sequence[str]) -> Upload | None:
    """What `--push_to_hub` asks for, found possible; None without. Raises InputError, see `plan_upload`.

    Args:
        folders: of the checkpoints, below the save path.
    """
    if arguments.push_to_hub is None:
        return None
    from checkpoints.upload import plan_upload

    return plan_upload(arguments.push_to_hub, folders, public=arguments.public, overwrite=arguments.overwrite)


def carry_out(job: Job, upload: Upload | None, arguments: argparse.Namespace) -> None:
    """Run a job and push what it made, or print its plan under `--dry_run`. Raises InputError as `Job.run`, `Upload.push`."""
    if arguments.dry_run:
        job.agree()
        if speaks(job.options):
            show_plan(job, upload, as_json=arguments.json, processes=arguments.processes)
        return
    if arguments.processes is not None:
        raise ArgumentError(
            f"{setting('processes')}: works with {setting('dry_run')} only. Start as many with torchrun, or leave it out."
        )
    options, speech = job.options, console(job.options)
    result = job.run(speech)
    if not speaks(options):
        return
    if result.was_complete:
        print(result.message)
    else:
        tell(result, speech)
    push(upload, job.save_path, speech, quiet=options.quiet, log=options.log)
    if result.was_complete and not upload:
        options.log("end", result=result.message)


def push(upload: Upload | None, save_path: Path, console: Console, *, quiet: bool, log: Log | None = None) -> None:
    """Push what was written, where that was asked for; say and log each repo when it is complete. Raises InputError as `Upload.push`."""
    for pushed in upload.push(save_path, quiet=quiet) if upload else ():
        console.say(f"pushed to {pushed.url} ({pushed.visibility}), commit {pushed.commit}")
        if log is not None:
            log("pushed", url=pushed.url, commit=pushed.commit)


def show_plan(job: Job, upload: Upload | None, *, as_json: bool, processes: int | None = None) -> None:
    """Print what would be done, and pushed, and what each of several processes would do."""
    shared = processes or (job.options.processes.size if job.options.processes else None)
    shares = job.shares(shared) if shared and not job.complete else None
    if job.complete:
        print(job.complete)
    elif as_json:
        plan = job.as_json() | ({"push_to_hub": upload.as_json(job.work.inputs, job.work.file_sizes)} if upload else {})
        plan |= {"processes": shares} if shares else {}
        print(json.dumps(shown(plan, show_flag), indent=2, ensure_ascii=False))
    else:
        print(job.as_text(show_flag))
        for share in shares["shares"] if shares else ():
            took = "" if share["expected_seconds"] is None else f", {share['expected_seconds']:g} s without writing"
            print(
                f"process {share['process']}: reads {share['bytes_to_read']:,} bytes, writes {share['bytes_to_write']:,} bytes, "
                f"at most {gigabytes(share['memory_bytes'])} of memory{took}"
            )
        if upload:
            print(upload.as_text(job.work.inputs, job.work.file_sizes))


def tell(result: Result, console: Console) -> None:
    """Say what came of a job."""
    for warning in result.warnings:
        console.warn(shown(warning, console.show))
    if result.report:
        from merging.report import format_report

        if len(result.plan.sweep) > 1:
            console.say(f"{result.plan.sweep[0].folder} (the other folders' reports are in their merge_recipe.json):")
        console.say(format_report(result.report) + "\n")
    if result.summary:
        console.say(result.summary)
    console.say(summary(result.save_path, result.written))


@contextmanager
def processes(prog: str, arguments: argparse.Namespace) -> Iterator[Processes | None]:
    """The processes that torchrun or its like started together with this one; None for one that is alone.

    What one of them refuses is said once, by the first.
    """
    launch = launch_of(os.environ)
    if launch is None:
        yield None
        return
    from streaming.processes import join

    joined = join(launch, arguments.process_timeout)
    try:
        with joined:
            yield joined
            return
    except InputError as error:
        if joined.is_first or not joined.has_been_said():
            say_on_stderr(f"{prog}: {error.shown(show_flag)}")
        joined.tell_said()
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        if joined.is_first:
            raise
        raise SystemExit(INTERRUPTED) from None


@contextmanager
def refusals_as_json(arguments: argparse.Namespace) -> Iterator[None]:
    """Under `--dry_run --json`, print what is refused as JSON too. Raises ArgumentError where --json stands alone."""
    if arguments.json and not arguments.dry_run:
        raise ArgumentError("--json: works with --dry_run only. Add that, or leave --json out.")
    try:
        yield
    except InputError as error:
        if arguments.json:
            problems = error.problems if isinstance(error, Refusals) else [error]
            print(
                json.dumps(
                    {"refusals": [str(problem.shown(show_flag)) for problem in problems]}, indent=2, ensure_ascii=False
                )
            )
        raise


@contextmanager
def progress_bar(title: str, total: int, unit: str = "B", *, quiet: bool) -> Iterator[Callable[[int], object]]:
    """A bar with bytes (or `unit`) a second and time left on stderr, silent without a terminal; yields what advances it."""
    from tqdm import tqdm

    disable = True if quiet else None
    with tqdm(
        total=total, desc=title, unit=unit, unit_scale=True, disable=disable, mininterval=0.2, smoothing=0.1
    ) as bar:
        yield bar.update


def speaks(options: RunOptions) -> bool:
    """Whether this process tells the user what comes of a run: of several the first."""
    return options.team.is_first


def console(options: RunOptions) -> Console:
    """How a command that writes a checkpoint speaks to the user; see `speaker`."""
    if not speaks(options):
        from streaming.console import Console

        return Console(show=show_flag)
    return speaker(quiet=options.quiet, log=options.log)


def speaker(*, quiet: bool, log: Log | None = None) -> Console:
    """How a command speaks to the user: results on stdout, remarks and bars on stderr, warnings even where quiet, once each,
    and in the log."""
    from streaming.console import Console

    warned: set[str] = set()

    def say(line: str) -> None:
        if not quiet:
            print(line)

    def note(line: str) -> None:
        if not quiet:
            say_on_stderr(line)

    def warn(line: str) -> None:
        if line not in warned:
            warned.add(line)
            if log is not None:
                log("warning", message=line)
            say_on_stderr(f"warning: {line}")

    return Console(say, note, warn, partial(progress_bar, quiet=quiet), show_flag)


@contextmanager
def run_log(path: str | None, command: list[str]) -> Iterator[Log]:
    """The log of `--log_file`, with its first and its last line; nothing without. Raises ArgumentError."""
    from streaming.log import RunLog, no_log

    if path is None:
        yield no_log
        return
    launch = launch_of(os.environ)
    suffix = f".process-{launch.rank}" if launch is not None and launch.rank else ""
    file = RunLog(Path(path + suffix).expanduser())
    ended = False

    def log(event: str, **fields: Any) -> None:
        nonlocal ended
        ended = ended or event == "end"
        file(event, **fields)

    with closing(file):
        log("start", command=command, version=VERSION)
        try:
            yield log
        except InputError as error:
            log("end", error=str(error.shown(show_flag)))
            raise
        except BaseException as error:
            log("end", error=str(error) or type(error).__name__)
            raise
        if not ended:
            log("end", result="complete")


def gigabytes(count: float) -> str:
    """`1.23 GB`, or MB and kB where that reads better."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def summary(save_path: Path, written: Written) -> str:
    """The last line of a command: what was read and written, how long it took, the largest memory."""
    rate = (written.bytes_read + written.bytes_written) / max(written.seconds, 1e-9)
    return (
        f"{save_path}: read {gigabytes(written.bytes_read)}, wrote {gigabytes(written.bytes_written)} "
        f"in {written.seconds:.2f} s ({rate / 1e9:.3f} GB/s), peak memory {gigabytes(written.peak_memory_bytes)}"
    )
