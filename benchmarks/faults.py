"""Cut runs of merge.py and performAIM.py off in every way there is, and see whether the next one makes the same bytes.

    PYTHONPATH=. python benchmarks/faults.py
    PYTHONPATH=. python benchmarks/faults.py --kills 40 --json faults.json

Each trial runs a command on the tiny golden models, with a fault, then, where that ended it, again without one, and compares
all files with those of a run that nothing disturbed. Faults: kill -9 at a random moment; a power loss at a random moment
that takes everything that was not flushed, or random parts of it; a write, and a flush, that fails from the N-th on, for
every N; a file system that is full. Commits are made every 2 ms instead of every second. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import merge
import performAIM
from benchmarks.fragile_disk import AFTER_POWER_LOSS, FLUSHES, WRITES, Fault, FragileDisk
from checkpoints.save_path import partial_folder
from evaluation.jail import kernel
from streaming import commits

INPUTS = Path(__file__).resolve().parent.parent / "tests" / "goldens" / "inputs"
MODELS = f"--base_model={INPUTS / 'base'}", f"--models_to_merge={INPUTS / 'math'},{INPUTS / 'code'}"
TEXT = f"--calibration_data={INPUTS / 'calib.jsonl.gz'}", "--n_samples=8", "--block_size=64"
COMMIT_S = 0.002
GOING_ON = re.compile(r"going on: (\d+) of (\d+)")


@dataclass(frozen=True)
class Command:
    """A command line, but for --save_path."""

    name: str
    main: Callable[[list[str]], int]
    arguments: tuple[str, ...]


COMMANDS = (
    Command("merge.py ties", merge.main, ("--method=ties", "--max_shard_size=100kB", *MODELS)),
    Command("merge.py --omegas", merge.main, ("--method=dare_linear", "--omegas=0.2,0.6", *TEXT, *MODELS)),
    Command(
        "performAIM.py",
        performAIM.main,
        (f"--merged_model={INPUTS / 'math'}", f"--pretrained_model_name={INPUTS / 'base'}", *TEXT),
    ),
)


@dataclass
class Row:
    """What came of the trials of one kind.

    runs: started, those that go on included; faults: that happened; incomplete: outputs that were visible while they were
    not complete; differ: results other than the undisturbed run's; failed: runs that did not go on to a result;
    went_on: trials in which the next run had tensors or calibrated blocks to go on with.
    """

    runs: int = 0
    faults: int = 0
    incomplete: int = 0
    differ: int = 0
    failed: int = 0
    went_on: int = 0
    problems: list[str] = field(default_factory=list)


class Trial:
    """One command in a folder of its own.

    Args:
        folder: of the output and the messages, emptied before each trial.
        command: which.
    """

    def __init__(self, folder: Path, command: Command):
        self.folder = folder / "watched"
        self.log = folder / "messages"
        self.out = self.folder / "out"
        self.command = command
        self.clear()
        self.seconds = 1e9
        for _ in range(3):
            self.clear()
            started = time.monotonic()
            if self.run():
                raise RuntimeError(f"{command.name}: {self.messages()}")
            self.seconds = min(self.seconds, time.monotonic() - started)
        self.expected = content(self.out)

    def clear(self) -> None:
        """Begin anew."""
        for path in (self.folder, self.folder.with_name(self.folder.name + AFTER_POWER_LOSS)):
            shutil.rmtree(path, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def messages(self) -> str:
        """What the last run said."""
        return self.log.read_text(errors="replace")

    def start(self, before: Callable[[], object] = lambda: None) -> int:
        """Run the command in a process of its own. Returns: its number."""
        child = os.fork()
        if child:
            return child
        code = 99
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            commits.COMMIT_S = COMMIT_S
            before()
            code = self.command.main([*self.command.arguments, f"--save_path={self.out}"])
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def run(self, before: Callable[[], object] = lambda: None) -> int:
        """Run it to its end. Returns: its exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.start(before), 0)[1])

    def run_with(self, fault: Fault) -> int:
        """Run it on a disk with a fault; after a power loss, the folder is what is left of it."""
        code = self.run(lambda: FragileDisk(self.folder, fault).install())
        left = self.folder.with_name(self.folder.name + AFTER_POWER_LOSS)
        if left.exists():
            shutil.rmtree(self.folder)
            left.rename(self.folder)
        return code

    def kill(self, after_s: float) -> int:
        """Run it and kill it."""
        child = self.start()
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def judge(self, row: Row, what: str, code: int) -> bool:
        """After a fault: look at what is visible, go on, and compare. Returns: whether the fault ended the run."""
        row.runs += 1
        ended = code != 0
        row.faults += ended
        if self.out.exists() and content(self.out) != self.expected:
            row.incomplete += 1
            row.problems.append(f"{what}: incomplete output")
        if not self.out.exists() or ended:
            row.runs += 1
            if self.run():
                row.failed += 1
                row.problems.append(f"{what}: {self.messages()[-400:]}")
                return ended
            found = GOING_ON.search(self.messages())
            row.went_on += bool(found)
        if content(self.out) != self.expected or partial_folder(self.out).exists():
            row.differ += 1
            row.problems.append(f"{what}: another result")
        return ended


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kills(trial: Trial, count: int, rng: random.Random) -> Row:
    """kill -9 at random moments, until as many have come before the end of the run."""
    row = Row()
    for _ in range(4 * count):
        if row.faults == count:
            break
        trial.clear()
        moment = rng.uniform(0.05, 1.0) * trial.seconds
        trial.judge(row, f"kill after {moment:.4f} s", trial.kill(moment))
    return row


def power_losses(trial: Trial, count: int, rng: random.Random) -> Row:
    """Power losses at random moments, every third one followed by another."""
    row = Row()
    calls = count_calls(trial, (*WRITES, *FLUSHES))
    for number in range(4 * count):
        if row.faults == count:
            break
        trial.clear()
        code = 0
        for _ in range(1 + (number % 3 == 2)):
            kind = rng.choice(("power", "power, kindly"))
            fault = Fault(kind, rng.randrange(calls), seed=rng.randrange(1 << 30))
            code = trial.run_with(fault) or code
        trial.judge(row, str(fault), code)
    return row


def failures(trial: Trial, calls: tuple[str, ...], every: int) -> Row:
    """Calls that fail from the N-th on, for every N (or every few)."""
    row = Row()
    for at in range(0, count_calls(trial, calls), every):
        trial.clear()
        fault = Fault("error", at, calls)
        trial.judge(row, str(fault), trial.run_with(fault))
    return row


def count_calls(trial: Trial, calls: tuple[str, ...]) -> int:
    """How many such calls an undisturbed run makes; differs a little from run to run, as commits do."""
    trial.clear()
    report = trial.log.with_name("calls")

    def count() -> None:
        disk = FragileDisk(trial.folder, Fault("none", -1, calls))
        disk.install()
        original = trial.command.main

        def main(arguments: list[str]) -> int:
            code = original(arguments)
            report.write_text(str(disk.count))
            return code

        trial.command = Command(trial.command.name, main, trial.command.arguments)

    trial.run(count)
    return int(report.read_text())


def full_disks(trial: Trial, count: int) -> Row | str:
    """A tmpfs that is too small by a share of the output, and is then made larger. A string where it cannot be mounted."""
    row = Row()
    whole = sum(map(len, trial.expected.values()))
    report = trial.log.with_name("row")
    for step in range(count):
        size = 8192 + int(whole * (step + 0.5) / count)
        trial.clear()
        child = os.fork()
        if not child:
            try:
                user, group = os.getuid(), os.getgid()
                kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS)
                kernel.map_identity(0, user, group)
                kernel.mount("tmpfs", str(trial.folder), "tmpfs", 0, f"size={size}")
                one = Row()
                code = trial.run(_without_space_check)
                kernel.mount("tmpfs", str(trial.folder), "tmpfs", MS_REMOUNT, f"size={size + 4 * whole + (8 << 20)}")
                trial.judge(one, f"tmpfs of {size} bytes", code)
                report.write_text(json.dumps(asdict(one)))
                os._exit(0)
            except OSError as error:
                report.write_text(str(error))
                os._exit(3)
            finally:
                os._exit(4)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            return f"no tmpfs here: {report.read_text() if report.exists() else code}"
        for key, value in json.loads(report.read_text()).items():
            setattr(row, key, getattr(row, key) + value)
    return row


MS_REMOUNT = 32


def _without_space_check() -> None:
    """Have the disk fill up while the run goes on: at its start it looks large enough."""
    import streaming.job

    vars(streaming.job)["check_space"] = lambda *_: []


def measure(folder: Path, arguments: argparse.Namespace) -> Iterator[tuple[str, str, Row | str]]:
    """(command, fault, what came of it), as they are done."""
    rng = random.Random(arguments.seed)
    for command in COMMANDS:
        trial = Trial(folder, command)
        share = -(-arguments.kills // len(COMMANDS))
        yield command.name, "kill -9", kills(trial, share, rng)
        yield command.name, "power loss", power_losses(trial, share, rng)
        yield command.name, "failing write", failures(trial, WRITES, arguments.every)
        yield command.name, "failing flush", failures(trial, FLUSHES, arguments.every)
        yield command.name, "full disk", full_disks(trial, max(1, 12 // arguments.every))


def warm_up() -> None:
    """Import what the commands import, so that a run takes a fraction of a second; no threads are left behind."""
    import transformers

    import aim.step
    import merging.merge_work
    import merging.report

    for name in ("AutoModelForCausalLM", "AutoTokenizer", "AutoConfig", "LlamaForCausalLM"):
        getattr(transformers, name)
    assert aim.step
    assert merging.merge_work
    assert merging.report


def main() -> int:
    """Run all trials and print the table; exit code 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kills", type=int, default=200, help="kills, and as many power losses, over all commands (200)"
    )
    parser.add_argument("--every", type=int, default=1, help="fail only every N-th write and flush (1: every one)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (0)")
    parser.add_argument("--json", type=Path, help="write the table there, too")
    arguments = parser.parse_args()
    warm_up()
    total = Row()
    rows = []
    print(
        "| command | fault | runs | faults | visible while incomplete | results that differ | failed to go on | went on with tensors |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for command, kind, row in measure(Path(folder), arguments):
            if isinstance(row, str):
                print(f"| {command} | {kind} | {row} |", flush=True)
                continue
            rows.append({"command": command, "fault": kind, **asdict(row)})
            numbers = (row.runs, row.faults, row.incomplete, row.differ, row.failed, row.went_on)
            print(f"| {command} | {kind} | {' | '.join(map(str, numbers))} |", flush=True)
            for key in ("runs", "faults", "incomplete", "differ", "failed", "went_on"):
                setattr(total, key, getattr(total, key) + getattr(row, key))
            total.problems += row.problems
    numbers = (total.runs, total.faults, total.incomplete, total.differ, total.failed, total.went_on)
    print(f"| all | all | {' | '.join(map(str, numbers))} |")
    for problem in total.problems:
        print(problem, file=sys.stderr)
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows, "all": asdict(total)}, indent=1) + "\n")
    return 1 if total.incomplete or total.differ or total.failed else 0


if __name__ == "__main__":
    sys.exit(main())
