"""Many mutants of each kind, in processes of their own, and a table of what came of them; see the package."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as set_seed

from tests.fuzz.mutants import KINDS, Mutant, mutants
from tests.fuzz.own_files import OWN_KINDS, OwnMutant, OwnPlace, own_mutants
from tests.fuzz.trial import HANG_S, Place, Verdict

BATCH = 250
"""Mutants of one process. A process that dies or hangs costs the rest of its batch, and is told of."""


OWN_BATCH = 2500
"""The same for our own files, whose sound versions take seconds to make: a kind is one process."""
OWN_SHARE = (5, 9)
"""Of the number of mutants of a kind, for those of our own files: 20,000 of nine kinds where there are 24,000 of six."""


@dataclass
class Row:
    """What came of the mutants of one kind."""

    accepted: int = 0
    refused: int = 0
    faults: list[tuple[str, str]] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    grown_bytes: int = 0

    def add(self, mutant: str, verdict: Verdict) -> None:
        self.accepted += verdict.accepted
        self.refused += not verdict.accepted
        if verdict.error:
            self.errors[verdict.error] += 1
        if verdict.fault:
            self.faults.append((mutant, verdict.fault))
        self.slowest_s = max(self.slowest_s, verdict.seconds)
        self.grown_bytes = max(self.grown_bytes, verdict.grown_bytes)


def judge_each(place: Place | OwnPlace, kind: str, count: int) -> Row:
    """Judge `count` mutants, the same each time, for a test: the smallest with a fault fails it."""
    row = Row()

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(own_mutants(kind) if kind in OWN_KINDS else mutants(kind))
    def judge(mutant: Any) -> None:
        verdict = place.judge(mutant)
        row.add(repr(mutant), verdict)
        assert not verdict.fault, verdict.fault

    judge()
    return row


def draw_mutants(kind: str, count: int, seed: int) -> list[Mutant | OwnMutant]:
    """`count` mutants; the same for the same seed."""
    drawn: list[Mutant | OwnMutant] = []

    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @set_seed(seed)
    @given(own_mutants(kind) if kind in OWN_KINDS else mutants(kind))
    def collect(mutant: Mutant | OwnMutant) -> None:
        drawn.append(mutant)

    collect()
    return drawn[:count]


def work(kind: str, count: int, seed: int, folder: Path) -> None:
    """Judge a batch; every mutant and its verdict go to a file, so that a death loses nothing."""
    import faulthandler

    place: Any = OwnPlace(folder) if kind in OWN_KINDS else Place(folder)
    with (folder / "verdicts").open("wb") as file:
        for mutant in draw_mutants(kind, count, seed):
            pickle.dump(mutant, file)
            file.flush()
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            verdict = place.judge(mutant)
            faulthandler.cancel_dump_traceback_later()
            pickle.dump(verdict, file)
            file.flush()


def start(kind: str, count: int, seed: int, folder: Path) -> int:
    """A process that judges a batch."""
    folder.mkdir()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        work(kind, count, seed, folder)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def verdicts(folder: Path, status: int) -> Iterator[tuple[Mutant | OwnMutant, Verdict]]:
    """What a process judged; where it died, the mutant that it died of."""
    with (folder / "verdicts").open("rb") as file:
        while True:
            try:
                mutant = pickle.load(file)
            except EOFError:
                break
            try:
                yield mutant, pickle.load(file)
            except EOFError:
                log = (folder / "log").read_text(errors="replace")[-3000:]
                yield mutant, Verdict(False, "", "", f"the process ended with {status}: {log}", 0.0, 0)
                return
    if status:
        log = (folder / "log").read_text(errors="replace")[-3000:]
        raise SystemExit(f"a process ended with {status}: {log}")


def warm_up() -> None:
    """Import what merges import, so that a process forked from this one need not; no threads are left behind."""
    import transformers

    from tests.fuzz import models

    for name in ("AutoModelForCausalLM", "AutoTokenizer", "AutoConfig", "LlamaForCausalLM", "PreTrainedTokenizerFast"):
        getattr(transformers, name)
    import merging.merge_work
    import streaming.output

    assert merging.merge_work
    assert streaming.output
    for traits in KINDS.values():
        for layout in traits.layouts:
            models.family(layout)


def fuzz(kinds: Sequence[str], count: int, seed: int, processes: int, folder: Path) -> dict[str, Row]:
    """Judge `count` mutants of each kind."""
    counts = {kind: -(-count * OWN_SHARE[0] // OWN_SHARE[1]) if kind in OWN_KINDS else count for kind in kinds}
    steps = {kind: OWN_BATCH if kind in OWN_KINDS else BATCH for kind in kinds}
    batches = [
        (kind, at, min(steps[kind], counts[kind] - at)) for kind in kinds for at in range(0, counts[kind], steps[kind])
    ]
    rows = {kind: Row() for kind in kinds}
    running: dict[int, tuple[str, Path]] = {}
    while batches or running:
        while batches and len(running) < processes:
            kind, at, size = batches.pop(0)
            place = folder / f"{kind}-{at}"
            running[start(kind, size, seed * 10**6 + at, place)] = kind, place
        child, status = os.wait()
        kind, place = running.pop(child)
        for mutant, verdict in verdicts(place, os.waitstatus_to_exitcode(status)):
            rows[kind].add(repr(mutant), verdict)
        if sys.stderr.isatty():
            print(f"\r{sum(row.accepted + row.refused for row in rows.values())} mutants", end="", file=sys.stderr)
        _remove(place)
    return rows


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def table(rows: dict[str, Row]) -> str:
    """For people, in Markdown."""
    lines = ["| kind | mutants | accepted | refused | faults | slowest | largest memory growth | errors |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---|"]
    for kind, row in rows.items():
        total = row.accepted + row.refused
        errors = ", ".join(f"{name} {number}" for name, number in row.errors.most_common())
        lines.append(
            f"| {kind} | {total} | {row.accepted} ({100 * row.accepted / max(1, total):.0f} %) | {row.refused} | {len(row.faults)} "
            f"| {row.slowest_s:.1f} s | {row.grown_bytes / 1e6:.0f} MB | {errors} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the command; exit code 1 where a mutant has a fault, or fewer than a tenth of a kind were accepted."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument(
        "--mutants",
        type=int,
        default=4000,
        help="of each kind of checkpoint (4000), and five ninths as many of each kind of our own files",
    )
    parser.add_argument("--kinds", default=",".join((*KINDS, *OWN_KINDS)), help="which, separated by commas (all)")
    parser.add_argument("--seed", type=int, default=0, help="another one draws other mutants (0)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="at a time (one per core)")
    parser.add_argument("--json", type=Path, help="write faults and numbers there")
    arguments = parser.parse_args()
    started = time.monotonic()
    warm_up()
    with tempfile.TemporaryDirectory() as folder:
        rows = fuzz(arguments.kinds.split(","), arguments.mutants, arguments.seed, arguments.processes, Path(folder))
    print(table(rows))
    print(f"\n{time.monotonic() - started:.0f} s")
    groups: dict[str, list[tuple[str, str]]] = {}
    for row in rows.values():
        for mutant, fault in row.faults:
            last = fault.strip().splitlines()[-1][:60] if "Traceback" in fault else fault[:50]
            groups.setdefault(last, []).append((mutant, fault))
    for last, found in sorted(groups.items(), key=lambda item: -len(item[1])):
        print(f"\n{len(found)} x {last}\n  {found[0][0]}\n  {found[0][1][-1500:]}")
    if arguments.json:
        arguments.json.write_text(json.dumps({kind: vars(row) for kind, row in rows.items()}, indent=1) + "\n")
    few = [kind for kind, row in rows.items() if row.accepted * 10 < row.accepted + row.refused]
    if few:
        print(f"fewer than a tenth accepted: {', '.join(few)}")
    return 1 if groups or few else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
