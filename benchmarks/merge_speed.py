"""Time and memory of merging and of AIM against the floor: reading every input once and writing the output once.

    python benchmarks/merge_speed.py --folder /tmp/merge_speed --quick
    python benchmarks/merge_speed.py --folder /tmp/merge_speed --scale 0.25,1 --against mergekit --profile
    python benchmarks/merge_speed.py --folder /tmp/merge_speed --render --update_docs docs/performance.md

Makes random checkpoints (1.1 billion parameters each where no sizes are given), runs every case in turn, round after
round, each as a process of its own as a user starts it, and takes the median of each figure over the rounds. What it
makes lies in --folder: the models, which are kept for the next run, and results.json, to which a later run on the same
machine adds its rows or replaces its own. Prints Markdown tables; the models and the merges have no skills.

Inputs lie in the page cache; before each run, what was written earlier is flushed. Each output is fsynced, here as in the
floor. Times are those of the whole process; "streaming" is the time from opening the output to the finished folder, which
the commands print, and for the floor the time without its fsync.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measured, speed_report
from benchmarks.floor import available_cores
from benchmarks.measured import CommandFailed, Run
from benchmarks.peer import Mergekit
from benchmarks.speed_report import AIM, DIGEST, MERGE, SWEEP
from benchmarks.speed_results import Results, Row, Setting, load, machine_line, note_compared
from benchmarks.synthetic import (
    Checkpoints,
    Shape,
    add_shape_flags,
    make_checkpoints,
    make_statistics,
    read_shape,
    weight_files,
)
from merging.methods import METHODS, get_method
from merging.parameters import REQUIRED

if TYPE_CHECKING:
    from merging.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
QUICK = Shape(hidden=512, layers=12, intermediate=1408, heads=8, kv_heads=4, vocabulary=16000)
PARTS = ("methods", "digest", "aim", "sweep", "performAIM", "calibration", "start")
OMEGAS = "0,0.2,0.4,0.6,0.8,1"
FREE = tuple(
    name
    for name, entry in METHODS.items()
    if all(parameter.default is not REQUIRED for parameter in entry.parameters.values())
    and not get_method(name).needs_data
)
PROFILED = ("linear", "task_arithmetic", "ties", "dare_ties", "widen")
MARKER = "merge_speed.folder"
"""Name of a file that shows that a folder is the benchmark's own."""
END_LINE = re.compile(r"read ([\d.]+) (\w+), wrote ([\d.]+) (\w+) in ([\d.]+) s \(")
UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
PLAIN = ("--digest", "none")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Case:
    """Something to measure: a command, and what to make of a run of it.

    row: where its values go; out: what it writes, removed after each run; accept: exit codes that are no error.
    env: of the command, beside what all have.
    """

    row: Row
    command: Callable[[], list[str]]
    read: Callable[[Run], dict[str, float | None]]
    out: Path
    accept: tuple[int, ...] = (0,)
    env: Mapping[str, str] = field(default_factory=dict)

    def run(self, *, counted: bool = True) -> None:
        """Once more. Raises CommandFailed."""
        _remove(self.out)
        os.sync()
        try:
            run = measured.run(self.command(), env={**OFFLINE, **self.env}, accept=self.accept)
        finally:
            _remove(self.out)
        whole = {"seconds": run.seconds, "cpu_s": run.cpu_seconds, "peak_bytes": run.peak_bytes}
        if counted:
            self.row.add({**whole, **self.read(run)})


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def read_end_line(run: Run) -> dict[str, float | None]:
    """What a command says of itself in its last line."""
    found = END_LINE.search(run.stdout.splitlines()[-1])
    assert found, f"the last line of a command is not what it was: {run.stdout.splitlines()[-1]}"
    read, read_unit, wrote, wrote_unit, seconds = found.groups()
    return {
        "stream_s": float(seconds),
        "bytes_read": float(read) * UNITS[read_unit],
        "bytes_written": float(wrote) * UNITS[wrote_unit],
    }


def read_floor(run: Run) -> dict[str, float | None]:
    """The floor's own seconds, which leave out the start of its interpreter."""
    printed = json.loads(run.stdout)
    names = {"seconds": "seconds", "stream_s": "unflushed_s"}
    names |= {name: name for name in ("bytes_read", "bytes_written")}
    return {name: printed[printed_name] for name, printed_name in names.items()}


def read_json(run: Run) -> dict[str, float | None]:
    """The numbers of a JSON object in the last line."""
    printed = json.loads(run.stdout.splitlines()[-1])
    return {name: value for name, value in printed.items() if isinstance(value, int | float)}


class Cases:
    """The cases of one setting.

    Args:
        setting, made: what is measured on.
        runs: a folder for what the cases write.
    """

    def __init__(self, setting: Setting, made: Checkpoints, runs: Path):
        self.setting = setting
        self.made = made
        self.runs = runs
        self.statistics = made.folder / "statistics.safetensors"
        self._floors: dict[str, Case] = {}

    def recipe(self, method: str) -> Recipe:
        """All fine-tunes, or as many as the method takes, with its default parameters."""
        from merging.recipe_flags import make_recipe

        most = get_method(method).max_models
        names = ",".join(map(str, self.made.fine_tunes[: most or None]))
        return make_recipe(method, str(self.made.base), names)

    def merge_flags(self, method: str, out: Path, *flags: str) -> list[str]:
        """merge.py and its flags for a recipe."""
        recipe = self.recipe(method)
        names = ",".join(str(model.name) for model in recipe.models)
        given = ["--base_model", str(recipe.base_model), "--models_to_merge", names, "--save_path", str(out)]
        return ["merge.py", "--method", method, *given, "--workers", str(self.setting.cores), "--device", "cpu", *flags]

    def aim_flags(self, out: Path, *flags: str) -> list[str]:
        """performAIM.py and its flags; the fine-tune that changed most stands for the merge."""
        inputs = ["--merged_model", str(self.made.fine_tunes[-1]), "--pretrained_model_name", str(self.made.base)]
        given = [*inputs, "--activations", str(self.statistics), "--save_path", str(out), *PLAIN]
        return ["performAIM.py", *given, "--workers", str(self.setting.cores), "--device", "cpu", *flags]

    def floor(self, inputs: Sequence[Path], outputs: int) -> str:
        """The case that reads these checkpoints and writes so many; its name."""
        name = f"floor: {len(inputs)} read, {outputs} written"
        files = weight_files(inputs)
        out = self.runs / "floor"
        size = sum(path.stat().st_size for path in weight_files([self.made.base]))

        def command() -> list[str]:
            out.mkdir(parents=True)
            written = [str(out / f"{number}.bin") for number in range(outputs)]
            flags = ["--read", *map(str, files), "--write", *written, "--size", str(size)]
            return [sys.executable, str(ROOT / "benchmarks/floor.py"), *flags, "--threads", str(self.setting.cores)]

        row = Row("floor", name, self.setting, floor=name)
        self._floors.setdefault(name, Case(row, command, read_floor, out))
        return name

    @property
    def floors(self) -> list[Case]:
        """Every floor that a case asked for."""
        return list(self._floors.values())

    def inputs_of(self, recipe: Recipe) -> list[Path]:
        """The checkpoints that a merge reads: a method that averages weights does not read the base."""
        from merging.merge_work import prepare
        from streaming.output import RunOptions

        job = prepare(recipe, self.runs / "plan", RunOptions())
        job.close()
        sources = {id(ref.source) for tensor in job.work.tensors for ref in tensor.sources(())}
        return [model.location.folder for model in job.work.inputs if id(model.weights) in sources]

    def case(self, name: str, flags: Callable[[Path], list[str]], floor: str, other: str = "") -> Case:
        """One of our commands, run to its end."""
        out = self.runs / "out"
        row = Row("merge", name, self.setting, floor=floor, other=other)
        return Case(row, lambda: [sys.executable, str(ROOT / flags(out)[0]), *flags(out)[1:]], read_end_line, out)

    def merge(self, method: str) -> Case:
        """A method with its defaults."""
        floor = self.floor(self.inputs_of(self.recipe(method)), 1)
        return self.case(method, lambda out: self.merge_flags(method, out, *PLAIN), floor)

    def digest(self) -> Case:
        """The merge with the digests that are the default."""
        floor = self.floor(self.inputs_of(self.recipe(MERGE)), 1)
        return self.case(DIGEST, lambda out: self.merge_flags(MERGE, out), floor, MERGE)

    def aim(self) -> Case:
        """Merge and AIM in one run, given the statistics."""
        floor = self.floor([self.made.base, *self.made.fine_tunes], 1)
        flags = ("--omega", "0.4", "--activations", str(self.statistics), *PLAIN)
        return self.case(AIM, lambda out: self.merge_flags(MERGE, out, *flags), floor, MERGE)

    def sweep(self) -> Case:
        """Six omegas from one reading."""
        floor = self.floor([self.made.base, *self.made.fine_tunes], len(OMEGAS.split(",")))
        flags = ("--omegas", OMEGAS, "--activations", str(self.statistics), *PLAIN)
        return self.case(SWEEP, lambda out: self.merge_flags(MERGE, out, *flags), floor)

    def perform_aim(self) -> Case:
        """An existing checkpoint relaxed, given the statistics."""
        floor = self.floor([self.made.base, self.made.fine_tunes[-1]], 1)
        return self.case("performAIM", self.aim_flags, floor)

    def calibration(self, repeats: int, *, quick: bool) -> Case:
        """A forward pass with its activations watched against a bare one; alternates by itself, so one round is enough."""
        shape = self.made.shape
        sizes = [
            f"--{name}={getattr(shape, name)}" for name in ("hidden", "layers", "intermediate", "heads", "kv_heads")
        ]
        blocks = ["--blocks", "1", "--block_size", "128"] if quick else ["--blocks", "8", "--block_size", "512"]
        flags = [*sizes, f"--vocabulary={shape.vocabulary}", *blocks, "--repeats", str(repeats), "--json"]
        command = [sys.executable, str(ROOT / "benchmarks/calibration_speed.py"), "--dtypes", "bfloat16", *flags]

        def read(run: Run) -> dict[str, float | None]:
            (found,) = json.loads(run.stdout)
            return {name: found[name] for name in ("bare_tokens_s", "watched_tokens_s", "share", "cpu_share")}

        tokens = f"bfloat16, {blocks[1]} x {blocks[3]} tokens"
        return Case(Row("calibration", tokens, self.setting), lambda: command, read, self.runs / "none")

    def starts(self, methods: Sequence[str]) -> list[Case]:
        """`--help`, and the time until the first byte of a weight is read."""
        out, nothing = self.runs / "out", self.runs / "none"
        relaxing = ("--omega", "0.4", "--activations", str(self.statistics))
        help_row = Row("start", "merge.py --help", self.setting)
        cases = [Case(help_row, lambda: [sys.executable, str(ROOT / "merge.py"), "--help"], lambda run: {}, nothing)]
        commands = {f"first byte of {method}": self.merge_flags(method, out) for method in methods}
        commands[f"first byte of {AIM}"] = self.merge_flags(MERGE, out, *relaxing)
        commands["first byte of performAIM"] = self.aim_flags(out)
        for name, flags in commands.items():
            row = Row("start", name, self.setting)
            cases.append(Case(row, lambda flags=flags: observed("first_byte", flags), read_json, out, accept=(1,)))  # type: ignore[misc]
        row = Row("start", f"first byte of {AIM}, the first time with this base", self.setting)
        new = lambda: observed("first_byte", commands[f"first byte of {AIM}"])  # noqa: E731
        cases.append(Case(row, new, read_json, out, accept=(1,), env={"MERGE_AIM_CACHE": "off"}))
        return cases

    def profile(self, method: str) -> Case:
        """A merge in which the threads are sampled."""
        out = self.runs / "out"
        row = Row("profile", method, self.setting)

        def read(run: Run) -> dict[str, float | None]:
            found = json.loads(run.stdout.splitlines()[-1])
            row.extra["shares"] = found["shares"]
            return {"samples": found["samples"]}

        return Case(row, lambda: observed("profile", self.merge_flags(method, out, *PLAIN)), read, out)

    def peer(self, mergekit: Mergekit, method: str) -> Case:
        """The same recipe by mergekit, on the same files."""
        recipe, out = self.recipe(method), self.runs / "peer"
        inputs = self.inputs_of(recipe)
        config = self.runs / f"{method}.yml"

        def command() -> list[str]:
            return mergekit.command(recipe.as_json(), config, out, with_base=self.made.base in inputs)

        row = Row("peer", method, self.setting, floor=self.floor(inputs, 1), other=method)
        return Case(row, command, lambda run: {}, out)


def observed(what: str, flags: Sequence[str]) -> list[str]:
    """A command below benchmarks/observed.py, which counts from now."""
    return [sys.executable, str(ROOT / "benchmarks/observed.py"), what, repr(time.monotonic()), *flags]


def run_rounds(cases: Sequence[Case], repeats: int, say: Callable[[str], object]) -> None:
    """Every case in turn, `repeats` times; a peer that fails is noted and left out from then on. Raises CommandFailed."""
    for number in range(1, repeats + 1):
        # Memory that has lain idle is slow to be had the first time, on virtual machines above all: not at the first case's cost.
        cases[0].run(counted=False)
        for case in cases:
            row = case.row
            if row.note or (row.kind in ("calibration", "profile") and number > 1):
                continue
            say(f"round {number} of {repeats}: {row.kind} {row.case}")
            try:
                case.run()
            except CommandFailed as error:
                if row.kind != "peer":
                    raise
                row.note = f"does not run: {str(error).splitlines()[-1]}"
                row.values.clear()


@contextmanager
def cores_limited_to(count: int) -> Iterator[None]:
    """Have this process, and what it starts, use the first `count` of its cores."""
    if count == available_cores():
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for models, merges and results: empty, not there, or of an earlier run; says how much disk it needs, and needs it free")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="50 million parameters, one round, only the methods, unless other flags say so")  # fmt: skip
    parser.add_argument("--methods", help=f"which to merge with (all that need no parameter: {', '.join(FREE)})")
    parser.add_argument("--parts", help=f"what to measure, any of {', '.join(PARTS)} (all)")
    parser.add_argument("--repeats", type=int, help="rounds (3)")
    parser.add_argument("--scale", default="1", help="sizes of the model as multiples of the one asked for: 0.25,0.5,1")
    parser.add_argument("--models", default="3", help="numbers of fine-tunes: 2,3,6 (3)")
    parser.add_argument("--cores", help="numbers of cores to use: 1,2 (all)")
    parser.add_argument("--against", choices=["mergekit"], help="measure it too, in an environment of its own that is installed from the package index into --folder")  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="sample what the threads do in --methods, or in five of them")  # fmt: skip
    parser.add_argument("--render", action="store_true", help="measure nothing; print what results.json has")
    parser.add_argument("--update_docs", type=Path, metavar="PAGE", help="put the tables between the marks in this page and the figures into figures/ beside it")  # fmt: skip
    add_shape_flags(parser)
    return parser


@dataclass(frozen=True)
class Request:
    """The flags, checked."""

    shapes: list[Shape]
    models: list[int]
    cores: list[int]
    methods: list[str]
    profiled: list[str]
    parts: list[str]
    repeats: int


def read_request(arguments: argparse.Namespace) -> Request:
    """What to measure. Raises ValueError: a flag is wrong."""
    shape = read_shape(arguments, QUICK if arguments.quick else Shape())
    scales = _numbers("--scale", arguments.scale, float)
    models = _numbers("--models", arguments.models, int)
    cores = _numbers("--cores", arguments.cores or str(available_cores()), int)
    if max(cores) > available_cores() or (cores != [available_cores()] and not hasattr(os, "sched_setaffinity")):
        raise ValueError(f"--cores: expected at most {available_cores()}, and this system to pin processes to cores")
    methods = _names("--methods", arguments.methods or ",".join(FREE), list(FREE))
    parts = _names("--parts", arguments.parts or ("methods" if arguments.quick else ",".join(PARTS)), PARTS)
    repeats = arguments.repeats or (1 if arguments.quick else 3)
    if repeats < 1:
        raise ValueError("--repeats: expected at least 1")
    profiled = [name for name in methods if arguments.methods or name in PROFILED]
    shapes = list(dict.fromkeys(shape.scaled(factor) for factor in scales))
    return Request(shapes, models, cores, methods, profiled if arguments.profile else [], parts, repeats)


def _numbers(flag: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) <= 0:
        raise ValueError(f"{flag}: expected numbers above 0, separated by commas, got {text!r}")
    return list(dict.fromkeys(numbers))


def _names(flag: str, text: str, known: Sequence[str]) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise ValueError(f"{flag}: expected any of {', '.join(known)}, got {name!r}")
    return [name for name in known if name in names]


def claim(folder: Path) -> None:
    """Take a folder for the benchmark. Raises ValueError: it holds something else."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MARKER).exists() and any(folder.iterdir()):
        raise ValueError(f"--folder {folder}: holds something else. Choose a folder that is empty or not there.")
    (folder / MARKER).touch()


def check_space(folder: Path, request: Request, mergekit: Mergekit | None, say: Callable[[str], object]) -> None:
    """Say how much disk is needed. Raises ValueError: there is less."""
    models = max(request.models)
    inputs = sum(Checkpoints(folder / "models" / shape.name, shape, models).missing_bytes for shape in request.shapes)
    outputs = max(shape.parameters for shape in request.shapes) * 2 * (6 if "sweep" in request.parts else 1)
    needed, free = inputs + outputs + (mergekit.missing_bytes if mergekit else 0), shutil.disk_usage(folder).free
    say(f"{folder}: {needed / 1e9:.1f} GB will be needed beside what is there, {free / 1e9:.1f} GB are free")
    if needed > free:
        raise ValueError(f"--folder {folder}: not enough disk. Free some, or lower --scale, --models or --layers.")


def collect(cases: Cases, request: Request, mergekit: Mergekit | None, *, quick: bool) -> list[Case]:
    """Every case that is asked for, the floors first."""
    parts = request.parts
    theirs = mergekit.methods() & set(request.methods) if mergekit else set()
    # What a ratio is taken of is measured too.
    merged = set(request.methods) if "methods" in parts else set(theirs)
    merged |= {MERGE} if {"digest", "aim", "sweep"} & set(parts) else set()
    found = [cases.merge(method) for method in METHODS if method in merged]
    makers = {"digest": cases.digest, "aim": cases.aim, "sweep": cases.sweep, "performAIM": cases.perform_aim}
    found += [make() for part, make in makers.items() if part in parts]
    if mergekit:
        found += [cases.peer(mergekit, method) for method in request.methods if method in theirs]
    if "calibration" in parts:
        found.append(cases.calibration(request.repeats, quick=quick))
    if "start" in parts:
        found += cases.starts([method for method in ("linear", "widen") if method in request.methods])
    found += [cases.profile(method) for method in request.profiled]
    return [*cases.floors, *found]


def measure(arguments: argparse.Namespace, request: Request, results: Results, say: Callable[[str], object]) -> Results:
    """Make the models, run every case in every setting, put the rows into `results` and keep those after each setting.

    Returns: the new rows alone.
    """
    new = Results(results.machine)
    folder = arguments.folder
    mergekit = Mergekit(folder / "mergekit") if arguments.against else None
    check_space(folder, request, mergekit, say)
    if mergekit:
        mergekit.install(say)
        results.peer = new.peer = mergekit.versions()
    for shape in request.shapes:
        make_checkpoints(folder / "models", shape, max(request.models), say=say)
        for models in request.models:
            made = Checkpoints(folder / "models" / shape.name, shape, models)
            for cores in request.cores:
                cases = Cases(Setting(shape.parameters, models, cores), made, folder / "runs")
                cases.runs.mkdir(exist_ok=True)
                if {"aim", "sweep", "performAIM", "start"} & set(request.parts) and not cases.statistics.exists():
                    say("taking activation statistics")
                    _in_a_process(make_statistics, made.base, made.texts, cases.statistics)
                with cores_limited_to(cores):
                    chosen = collect(cases, request, mergekit, quick=arguments.quick)
                    _warm_up(weight_files([made.base, *made.fine_tunes]))
                    run_rounds(chosen, request.repeats, say)
                note_compared([case.row for case in chosen])
                for one in (results, new):
                    one.put(case.row for case in chosen)
                results.save(folder / "results.json")
                _remove(cases.runs)
    return new


def _in_a_process(work: Callable[..., object], *arguments: Any) -> None:
    """What needs a model in memory has it in a process that ends."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise CommandFailed(f"{getattr(work, '__name__', work)} failed; see above")


def _warm_up(files: Sequence[Path]) -> None:
    """Read files, so that the page cache holds what of them fits."""
    buffer = bytearray(1 << 20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def load_results(path: Path, machine: str) -> Results:
    """What earlier runs found. Raises ValueError: on another machine, with which these results do not compare."""
    if not path.exists():
        return Results(machine)
    results = load(path)
    if results.machine != machine:
        raise ValueError(f"{path}: was measured on {results.machine}; this is {machine}. Choose another --folder.")
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    path = arguments.folder / "results.json"
    try:
        if arguments.render:
            results = shown = load(path)
        else:
            request = read_request(arguments)
            claim(arguments.folder)
            versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
            results = load_results(path, machine_line(versions))
            shown = measure(arguments, request, results, say)
        text = speed_report.as_markdown(shown)
        if arguments.update_docs:
            text = speed_report.as_markdown(results)
            figures = speed_report.draw(results, arguments.update_docs.parent / "figures")
            links = "\n\n".join(map(speed_report.shown, figures))
            speed_report.put_into_page(arguments.update_docs, f"{text}\n\n{links}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except (CommandFailed, subprocess.CalledProcessError) as error:
        print(f"merge_speed.py: {error}", file=sys.stderr)
        return 1
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
