"""Several processes that share one run: the same bytes as one, whatever their number; gone on with by any number; one message where one fails.

Most tests run the processes as threads of this one, which meet in a store in memory: everything but the start is as under torchrun.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.distributed import HashStore

import merge
from aim.watcher import Watcher
from benchmarks import scale_model
from checkpoints.errors import InputError, WriteError
from checkpoints.journal import Journal
from checkpoints.process import Launch, launch_of
from checkpoints.save_path import partial_folder
from checkpoints.work_folder import STATE
from checkpoints.writer import CheckpointWriter
from forward.parts import Use
from merging import make_recipe
from merging.merge_work import prepare
from streaming import commits, processes
from streaming.blocks import TensorSpec, tile
from streaming.job import Job, Result
from streaming.output import RunOptions
from streaming.processes import ProcessEnded, Processes
from streaming.shares import share_out
from streaming.stream import PlannedTensor, StreamOptions
from streaming.tally import Tally
from streaming.work import Variant, gaps, remaining
from tests.scene import call, snapshot

ROOT = Path(__file__).resolve().parent.parent
INPUTS = Path(__file__).parent / "goldens" / "inputs"


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished tensors are committed at once, and signs of life come often."""
    monkeypatch.setattr(commits, "COMMIT_S", 0.01)
    monkeypatch.setattr(processes, "BEAT_S", 0.02)
    monkeypatch.setattr(processes, "END_S", 2.0)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the golden models in `in`."""
    shutil.copytree(INPUTS, tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def together(
    count: int, work: Callable[[Processes], Any], *, wait_s: float = 20, missing: Sequence[int] = ()
) -> list[Any]:
    """Run `work` as so many processes, but for those that do not come. Returns: what each gave, or raised."""
    store = HashStore()
    outcomes: list[Any] = [None] * count

    def run(rank: int) -> None:
        try:
            with Processes(store, Launch(rank, count, rank, count, "here", 1), wait_s) as joined:
                outcomes[rank] = work(joined)
        except BaseException as error:
            outcomes[rank] = error

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(count) if rank not in missing
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return outcomes


def merge_job(
    method: str, options: RunOptions, out: str = "out", models: str = "in/math,in/code", **parameters: Any
) -> Job:
    return prepare(make_recipe(method, "in/base", models, parameters=parameters), Path(out), options)


SMALL = RunOptions(stream=StreamOptions(workers=1, block_elements=512))
"""Blocks so small that every tensor can be cut."""


def run_merge(method: str, options: RunOptions = SMALL, **how: Any) -> Callable[[Processes], Result]:
    return lambda joined: merge_job(method, replace(options, processes=joined), **how).run()


def kept(folder: str = "out") -> dict[str, bytes]:
    written = snapshot(Path(folder))
    shutil.rmtree(folder)
    return written


# ------------------------------------------------------------------------------------------------------------ shares


class Merges:
    space, reads_base, whole_rows = "task_vectors", True, False

    def __init__(self, *, measures: bool):
        self.measures = measures


class Ref:
    def __init__(self, numel: int):
        self.info = type("Info", (), {"nbytes": 2 * numel})


def tensors_of(*shapes: tuple[int, ...], measures: bool = False) -> list[PlannedTensor]:
    return [
        PlannedTensor(
            TensorSpec(f"t{at}", shape),
            torch.bfloat16,
            Ref(TensorSpec("", shape).numel),
            (Ref(TensorSpec("", shape).numel),) * 2,
            Merges(measures=measures),
        )  # type: ignore[arg-type]
        for at, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_shares_have_every_element_once_and_about_the_same_bytes(count: int):
    tensors = tensors_of((300, 64), (7,), (0, 3), (3, 40, 64), (1, 5000), (), (64, 64))
    shares = share_out(tensors, [Variant()], count, 128)
    assert len(shares) == count
    assert [t.spec.name for share in shares for t in share] == sorted(t.spec.name for share in shares for t in share)
    for tensor in tensors:
        parts = [t.part for share in shares for t in share if t.spec.name == tensor.spec.name]
        spans = [part or (0, tensor.spec.numel) for part in parts]
        assert gaps(tensor.spec.numel, spans) == []
        assert sum(stop - start for start, stop in spans) == tensor.spec.numel
        starts = {region.start for region in tile(tensor.spec, 128)} | {tensor.spec.numel, 0}
        assert {edge for span in spans for edge in span} <= starts
    sizes = [sum(t.numel for t in share) for share in shares]
    assert max(sizes) <= sum(sizes) / count + 128


def test_a_measured_tensor_stays_whole():
    tensors = tensors_of((64, 64), (64, 64), (64, 64), measures=True)
    shares = share_out(tensors, [Variant()], 2, 128)
    assert all(tensor.part is None for share in shares for tensor in share)
    assert sorted(map(len, shares)) == [1, 2]


def test_what_is_left_is_shared_out_again():
    (tensor,) = tensors_of((100, 8))
    left = remaining([tensor], (), {"t0": [(80, 160), (400, 800)]})
    assert [one.part for one in left] == [(0, 80), (160, 400)]
    shares = share_out(left, [Variant()], 2, 8)
    assert [[one.part for one in share] for share in shares] == [[(0, 80), (160, 240)], [(240, 400)]]
    assert remaining([tensor], {"t0"}, {}) == []


@pytest.mark.parametrize("shape", [(40, 8), (6, 5, 8), (3, 1000), (17,)])
def test_blocks_of_a_part_are_those_of_the_whole(shape: tuple[int, ...]):
    tensor = TensorSpec("t", shape)
    whole = [(region.start, region.stop) for region in tile(tensor, 64)]
    for at in range(len(whole) + 1):
        edge = whole[at][0] if at < len(whole) else tensor.numel
        parts = [*tile(tensor, 64, (0, edge)), *tile(tensor, 64, (edge, tensor.numel))]
        assert [(region.start, region.stop) for region in parts] == whole
        for region in tile(tensor, 200, (edge, tensor.numel)):  # larger blocks hold whole rows or pieces of one, too
            matrices, rows, columns = region.shape
            assert matrices * rows * columns == region.numel


def test_sums_of_parts_are_those_of_one_that_saw_all():
    rows = {at: (0.1 * (at % 7), 1e9 if at % 3 else 1e-9) for at in range(0, 2000, 20)} | {
        -1 - at: (1.0, 0.3) for at in range(0, 1000, 100)
    }
    whole = Tally(2, lambda sums: {}, places=2)
    part, other = Tally(2, lambda sums: {}, places=2), Tally(2, lambda sums: {}, places=2)
    for at, numbers in rows.items():
        whole.add("t", at, numbers)
        (part if (at if at >= 0 else -1 - at) // 2 < 400 else other).add("t", at, numbers)
    taken = json.loads(json.dumps(other.take("t", (400, 1000))))
    assert part.accepts_rows(taken)
    assert other.take("t", (0, 1000)) == []
    part.put("t", taken)
    assert part.close("t") == whole.close("t")


@pytest.mark.parametrize("rows", [None, 3, [1], [[1.0, 2, 3]], [[1, 2]], [[1, 2, "3"]], [[1, 2, float("nan")]]])
def test_rows_of_a_journal_that_no_tally_made(rows: Any):
    assert not Tally(2, lambda sums: {}).accepts_rows(rows)


# --------------------------------------------------------------------------------------------------- the same bytes


def same_but_time(mine: dict[str, bytes], other: dict[str, bytes]) -> None:
    assert mine.keys() == other.keys()
    for name in mine:
        assert mine[name] == other[name], name


@pytest.mark.parametrize(
    ("method", "count", "parameters"),
    [
        ("dare_ties", 2, {}),
        ("ties", 3, {}),
        ("della", 2, {}),
        ("linear", 5, {}),
    ],
)
def test_processes_write_the_bytes_of_one(place: Path, method: str, count: int, parameters: dict[str, Any]):
    options = replace(SMALL, report="full", max_shard_bytes=60_000)
    alone = merge_job(method, options, **parameters).run()
    expected = kept()
    results = together(count, run_merge(method, options, **parameters))
    same_but_time(kept(), expected)
    assert results[0].report == alone.report
    assert results[0].written.bytes_read == alone.written.bytes_read
    assert results[0].written.bytes_written == alone.written.bytes_written
    assert not partial_folder(Path("out")).exists()


def test_every_process_takes_part_and_tensors_are_cut(place: Path, monkeypatch: pytest.MonkeyPatch):
    written: dict[str, set[str]] = {}
    write = CheckpointWriter.write

    def note(writer: CheckpointWriter, name: str, *rest: Any) -> None:
        written.setdefault(threading.current_thread().name[:5], set())
        write(writer, name, *rest)

    appended: dict[str, list[dict[str, Any]]] = {}
    append = Journal.append
    monkeypatch.setattr(
        Journal,
        "append",
        lambda journal, record: (appended.setdefault(journal.path.name, []).append(record), append(journal, record))[1],
    )
    monkeypatch.setattr(CheckpointWriter, "write", note)
    together(3, run_merge("task_arithmetic"))
    assert set(appended) == {"journal", "journal-1", "journal-2"}
    assert any(record.get("parts") for records in appended.values() for record in records)
    bytes_of = [sum(sum(pieces[1::3]) for record in records for places in [*record["written"].values(), *(part[4] for part in record.get("parts", ()))] for _, pieces in places) for records in appended.values()]  # fmt: skip
    assert max(bytes_of) < 1.2 * min(bytes_of)
    assert (Path("out") / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------- one ends, all go on later


def cut_off(monkeypatch: pytest.MonkeyPatch, count: int, method: str, error: BaseException, rank: int) -> list[Any]:
    """Run as so many processes, of which one fails in a write when it has committed something."""
    write, append, add, init = CheckpointWriter.write, Journal.append, commits.Commits.add, CheckpointWriter.__init__
    name = f"journal-{rank}" if rank else "journal"
    added, committed, writers = threading.Event(), threading.Event(), set[int]()

    def note_writer(writer: CheckpointWriter, *arguments: Any, **keywords: Any) -> None:
        if threading.current_thread().name == f"rank {rank}":
            writers.add(id(writer))
        init(writer, *arguments, **keywords)

    def note_added(waiting: commits.Commits, *arguments: Any) -> None:
        add(waiting, *arguments)
        if waiting._journal.path.name == name:
            added.set()

    def note_committed(journal: Journal, record: dict[str, Any]) -> None:
        append(journal, record)
        if journal.path.name == name and "tensors" in record:
            committed.set()

    def fail(writer: CheckpointWriter, *arguments: Any) -> None:
        if id(writer) in writers and added.is_set():
            assert committed.wait(30)
            raise error
        write(writer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "__init__", note_writer)
        patch.setattr(CheckpointWriter, "write", fail)
        patch.setattr(Journal, "append", note_committed)
        patch.setattr(commits.Commits, "add", note_added)
        return together(count, run_merge(method))


@pytest.mark.parametrize(("rank", "later"), [(1, 3), (0, 1), (1, 1), (0, 2)])
def test_any_number_goes_on_where_one_ended(place: Path, monkeypatch: pytest.MonkeyPatch, rank: int, later: int):
    merge_job("dare_ties", SMALL).run()
    expected = kept()
    full = WriteError(Path("out.partial/model.safetensors"), OSError(28, "No space left on device"))
    outcomes = cut_off(monkeypatch, 2, "dare_ties", full, rank)
    assert all(isinstance(outcome, InputError) for outcome in outcomes)
    assert "No space left on device" in str(outcomes[0])
    assert ("process 1 of 2" in str(outcomes[0])) is (rank == 1)
    state = partial_folder(Path("out")) / STATE
    done = [record for path in sorted(state.glob("journal*")) for record in records_in(path)]
    finished = {name for record in done for name in record.get("tensors", ())}
    assert finished or any(record.get("parts") for record in done)
    again: set[str] = set()
    write = CheckpointWriter.write
    monkeypatch.setattr(
        CheckpointWriter, "write", lambda writer, name, *rest: (again.add(name), write(writer, name, *rest))[1]
    )
    if later == 1:
        merge_job("dare_ties", SMALL).run()
    else:
        together(later, run_merge("dare_ties"))
    assert not again & finished
    same_but_time(kept(), expected)


def records_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line.partition(b" ")[2]) for line in path.read_bytes().splitlines()]


def test_an_input_at_fault_ends_all_and_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch):
    outcomes = cut_off(monkeypatch, 2, "ties", InputError("in/math: a NaN"), 1)
    assert isinstance(outcomes[0], ProcessEnded)
    assert str(outcomes[0]).endswith("in/math: a NaN")
    assert not partial_folder(Path("out")).exists()


def test_bytes_that_another_process_lost_are_made_again(place: Path, monkeypatch: pytest.MonkeyPatch):
    merge_job("task_arithmetic", SMALL).run()
    expected = kept()
    cut_off(monkeypatch, 2, "task_arithmetic", KeyboardInterrupt(), 1)
    file = partial_folder(Path("out")) / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    results = together(2, run_merge("task_arithmetic"))
    assert isinstance(results[0], Result)
    same_but_time(kept(), expected)


def test_parts_in_a_journal_that_are_not_of_the_format(place: Path, monkeypatch: pytest.MonkeyPatch):
    """Records of parts with other fields, of other elements, or of numbers that no tally makes, are made again."""
    merge_job("task_arithmetic", SMALL).run()
    expected = kept()
    cut_off(monkeypatch, 2, "task_arithmetic", KeyboardInterrupt(), 1)
    state = partial_folder(Path("out")) / STATE
    from checkpoints.folder import Folder

    good = next(record for path in state.glob("journal*") for record in records_in(path) if record.get("written"))
    name, places = next(iter(good["written"].items()))
    start, stop, notes = 0, sum(places[0][1][1::3]) // 2, [[] for _ in next(iter(good["tensors"].values()))]
    with Folder.open(state) as folder:
        journal = Journal(folder, "journal-9")
        for part in (
            [name, start], [name, 5, 1, notes, places], [name, -1, stop, notes, places], [name, start, 1 << 70, notes, places],
            [name, start, stop, notes, [["../x", [0, 1, 2]]]], [3, start, stop, notes, places], "part",
            [name, start, stop, [], places], [name, start, stop, [["a"]], places], ["unknown", start, stop, notes, places],
            [name, start + 1, stop + 1, notes, places], [name, start, stop + 10**9, notes, places],
        ):  # fmt: skip
            journal.append({**good, "tensors": {}, "written": {}, "parts": [part]})
        journal.close()
    merge_job("task_arithmetic", SMALL).run()
    same_but_time(kept(), expected)


# ------------------------------------------------------------------------------------------------------- bad input


def messages(outcomes: Sequence[Any]) -> list[str]:
    assert all(isinstance(outcome, InputError) for outcome in outcomes), outcomes
    return [str(outcome) for outcome in outcomes]


def test_processes_that_would_do_something_else(place: Path):
    def work(joined: Processes) -> Result:
        return run_merge("ties", **{"lambda": 0.5 if joined.rank == 2 else 1.0})(joined)

    first = messages(together(3, work))[0]
    assert first.startswith("process 2 of 3 (")
    assert "expected the inputs, flags and versions of process 0 of 3" in first
    assert "recipe.parameters.lambda (0.5 there, 1.0 here)" in first
    assert sorted(path.name for path in place.iterdir()) == ["in"]


def test_processes_that_see_other_inputs(place: Path):
    shutil.copytree("in/math", "in/other")
    with (place / "in/other/model.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x01\x02")

    def work(joined: Processes) -> Result:
        return run_merge("ties", models="in/math,in/code" if joined.is_first else "in/other,in/code")(joined)

    assert "process 1 of 2" in messages(together(2, work))[0]


def test_what_one_refuses_and_what_all_refuse(place: Path):
    def work(joined: Processes) -> Result:
        return run_merge("ties", models="in/math,in/code" if joined.is_first else "in/math,in/none")(joined)

    outcomes = messages(together(2, work))
    assert outcomes[0].startswith("process 1 of 2 (")
    assert "in/none" in outcomes[0]
    outcomes = messages(together(2, run_merge("ties", models="in/math,in/none")))
    assert outcomes[0].startswith("in/none: ")
    assert sorted(path.name for path in place.iterdir()) == ["in"]


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_that_is_not_shared(place: Path, there: bool):
    """Where nothing is, or another run's folder."""
    if there:
        (place / "else/out.partial" / STATE).mkdir(parents=True, mode=0o700)
        (place / "else/out.partial").chmod(0o700)
    (place / "else").mkdir(exist_ok=True)

    def work(joined: Processes) -> Result:
        return run_merge("ties", out="out" if joined.is_first else "else/out")(joined)

    results = together(2, work)
    outcomes = messages(results)
    assert "process 1 of 2" in outcomes[0]
    assert "it is not shared" in outcomes[0]
    assert type(results[1]).__name__ == "NotShared"
    assert not partial_folder(place / "out").exists()


def test_processes_that_do_not_answer(place: Path):
    outcomes = together(4, run_merge("ties"), wait_s=0.3, missing=[1, 3])
    assert "process 1, 3 of 4 did not answer within 0.3 s" in str(outcomes[0])
    assert isinstance(outcomes[2], InputError)
    assert sorted(path.name for path in place.iterdir()) == ["in"]


@pytest.mark.parametrize("silent", [0, 1])
def test_a_process_that_falls_silent(place: Path, monkeypatch: pytest.MonkeyPatch, silent: int):
    """As one whose machine has gone: it says nothing more, not even that it ends."""

    def work(joined: Processes) -> Any:
        if joined.rank == silent:
            joined._over.set()
            joined._thread.join()
            monkeypatch.setattr(joined, "fail", lambda error: None)
            threading.Event().wait(1.5)
            raise SystemExit(0)
        return run_merge("ties")(joined)

    outcomes = together(2, work, wait_s=0.5)
    assert f"process {silent} of 2" in str(outcomes[1 - silent])
    assert "gives no sign of life any more" in str(outcomes[1 - silent])


def test_an_earlier_run_s_process_still_writes(place: Path, monkeypatch: pytest.MonkeyPatch):
    from checkpoints.folder import Folder
    from checkpoints.work_folder import member

    cut_off(monkeypatch, 2, "ties", KeyboardInterrupt(), 1)
    with Folder.open(partial_folder(Path("out")) / STATE) as state, member(state, "x", writes=False):
        for outcome in (*together(2, run_merge("ties")),):
            assert "a process of an earlier run is still writing it" in str(outcome)
        with pytest.raises(InputError, match="a process of an earlier run is still writing it"):
            merge_job("ties", SMALL).run()
    merge_job("ties", SMALL).run()


def test_a_complete_result_is_not_made_again(place: Path):
    together(2, run_merge("ties"))
    before = snapshot(Path("out"))
    assert [result.was_complete for result in together(2, run_merge("ties"))] == [True, True]
    assert snapshot(Path("out")) == before


ENVIRONMENT = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}  # fmt: skip


def test_how_a_process_was_started():
    assert launch_of({}) is None
    assert launch_of({"WORLD_SIZE": "1", "RANK": "0"}) is None
    assert launch_of(ENVIRONMENT) == Launch(1, 2, 1, 2, "host", 29500)
    without = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("LOCAL")}
    assert launch_of(without) == Launch(1, 2, 0, 1, "host", 29500)


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "2"), ("RANK", "x"), ("MASTER_ADDR", ""), ("MASTER_PORT", "none"), ("WORLD_SIZE", "many")],
)
def test_half_of_how_a_process_was_started(name: str, value: str):
    with pytest.raises(InputError, match=f"{name}: expected"):
        launch_of({**ENVIRONMENT, name: value})


# ------------------------------------------------------------------------------------------------------------- sums


def watched(blocks: torch.Tensor, tmp: nn.Module) -> Watcher:
    """A watcher that has seen blocks of inputs `[blocks, tokens, in]` of two weights that share them, and a third that does not."""
    watcher = Watcher(tmp, {})
    for block in blocks.split(1):
        watcher.block = (1, block.shape[1])
        for name in ("a", "b"):
            watcher.observe(Use(name, 1, ((0, 4), (0, block.shape[2]))), block)
        other = block * 2
        watcher.observe(Use("c", 1, ((0, 4), (0, block.shape[2]))), other)
    return watcher


def test_sums_of_several_processes_are_those_of_one():
    blocks = torch.randn(6, 40, 5, generator=torch.Generator().manual_seed(0)).round(decimals=3)
    blocks = (blocks * 1024).round() / 1024  # so that no sum is rounded
    model = nn.Linear(5, 4)
    whole, parts = watched(blocks, model).sums(), [watched(blocks[at : at + 2], model) for at in (0, 2, 4)]
    for other in parts[1:]:
        parts[0].add(other.sums())
    added = parts[0].sums()
    assert added.keys() == whole.keys()
    for name in whole:
        assert torch.equal(added[name], whole[name]), name
    parts[1].forget()
    assert parts[1].sums() == {}


# -------------------------------------------------------------------------------------------------------- as commands

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
RUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]
AIM = ["--calibration_data=in/calib.jsonl.gz", "--n_samples=24", "--block_size=64", "--calibration_dtype=float32"]
DATA = ["--model_data=in/calib.jsonl.gz,in/calib.jsonl.gz", "--data_tokens=200"]
MERGE = [str(ROOT / "merge.py"), "--base_model=in/base", "--models_to_merge=in/math,in/code", "--save_path=out"]
RELAX = [
    str(ROOT / "performAIM.py"),
    "--merged_model=in/math",
    "--pretrained_model_name=in/base",
    "--save_path=out",
    *AIM,
]


def command(*argv: str, processes: int = 0, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command alone, or as so many processes under torchrun."""
    start = [*RUN, str(processes)] if processes else [sys.executable]
    ended = subprocess.run([*start, *argv], env=ENV, capture_output=True, text=True, timeout=300)
    assert ended.returncode == code, ended.stderr
    return ended


def alone_and_together(argv: list[str], processes: int) -> tuple[str, str]:
    """Run a command alone and as several; the results must be the same. Returns: what both printed."""
    alone = command(*argv).stdout
    expected = kept()
    together = command(*argv, processes=processes).stdout
    same_but_time(kept(), expected)
    return alone, together


def test_torchrun_merges_calibrates_and_relaxes_to_the_bytes_of_one(place: Path):
    """One message of everything, by the first process; then a folder that one of them refuses."""
    alone, together = alone_and_together([*MERGE, "--method=ties", "--omega=0.3", *AIM], 2)
    without = [re.sub(r"[\d.,]+ (?:s|tokens/s|GB/s|MB|GB)\b", "", text) for text in (alone, together)]
    assert without[0] == without[1]
    ended = command(*MERGE, "--method=ties", "--lambda=x", processes=2, code=1)
    assert ended.stderr.count("merge.py: --lambda: expected") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "processes"),
    [
        ([*RELAX, "--omegas=0,0.4", "--calibration_tolerance=0"], 3),
        ([*RELAX, "--calibration_mode=layerwise"], 2),
        ([*MERGE, "--method=regmean", *DATA], 3),
        ([*MERGE, "--method=regmean", "--inputs=merged", *DATA], 2),
        ([*MERGE, "--method=dare_linear", "--omega=0.3", "--protect=mean", *AIM], 2),
        ([*MERGE, "--method=ties", "--lambdas=0.3,0.5"], 2),
    ],
)
def test_torchrun_of_other_commands(place: Path, argv: list[str], processes: int):
    alone_and_together(argv, processes)


CUT_OFF = """
import sys

from aim import together
from aim.unfinished import UnfinishedCalibration
from checkpoints.errors import InputError
from commands.perform_aim import main
from streaming import commits

together.BLOCKS_AT_ONCE, commits.COMMIT_S = 2, 0.0
add_up, restore, sums = together.Together.add_up, UnfinishedCalibration.restore, []


def fail(self, watcher, end, **how):
    sums.append(end)
    if len(sums) == 3 and not self.is_first and "{cut}":
        raise KeyboardInterrupt
    return add_up(self, watcher, end, **how)


def say(self, enough):
    print("blocks there:", self.blocks, file=sys.stderr)
    return restore(self, enough)


together.Together.add_up, UnfinishedCalibration.restore = fail, say
sys.exit(main())
"""
"""performAIM.py, whose sums are added up and kept after four blocks; the second process ends where it would give its third."""


@pytest.mark.slow
@pytest.mark.parametrize("later", [0, 3])
def test_a_calibration_that_was_cut_off_within_a_group_goes_on(place: Path, later: int):
    flags = [*RELAX[1:], "--calibration_tolerance=0"]
    command(RELAX[0], *flags)
    expected = kept()
    (place / "cut.py").write_text(CUT_OFF.format(cut="yes"))
    (place / "on.py").write_text(CUT_OFF.format(cut=""))
    ended = subprocess.run([*RUN, "2", "cut.py", *flags], env=ENV, capture_output=True, text=True, timeout=300)
    assert ended.returncode
    assert not Path("out").exists()
    assert list((partial_folder(Path("out")) / STATE).glob("calibration-8.safetensors")), ended.stderr
    assert "blocks there: 8" in command("on.py", *flags, processes=later).stderr
    written = kept()
    assert written["model.safetensors"] == expected["model.safetensors"]


@pytest.mark.slow
def test_accelerate_launch(place: Path):
    command(*MERGE, "--method=dare_ties")
    expected = kept()
    command("-m", "accelerate.commands.launch", "--num_processes=2", "--cpu", *MERGE, "--method=dare_ties")
    same_but_time(kept(), expected)


def shares_of(*flags: str) -> Any:
    return json.loads(call(merge, *MERGE[1:], "--method=ties", "--dry_run", "--json", *flags).out)["processes"]


def test_a_dry_run_says_what_each_process_would_do(place: Path):
    plan = json.loads(call(merge, *MERGE[1:], "--method=ties", "--dry_run", "--json").out)
    assert "processes" not in plan
    shares = shares_of("--processes=3", "--workers=2")
    assert (shares["count"], shares["threads"], len(shares["shares"])) == (3, 2, 3)
    assert sum(share["bytes_to_read"] for share in shares["shares"]) == plan["bytes_to_read"]
    assert 0 < plan["bytes_to_write"] - sum(share["bytes_to_write"] for share in shares["shares"]) < 5000  # the header
    assert sum(share["tensors"] for share in shares["shares"]) == plan["tensors"]
    assert shares["expected_seconds"] == max(share["expected_seconds"] for share in shares["shares"]) > 0
    assert all(2 * 10**8 < share["memory_bytes"] < 10**9 for share in shares["shares"])
    said = call(merge, *MERGE[1:], "--method=ties", "--dry_run", "--processes=2").out
    assert len(re.findall(r"^process \d: reads [\d,]+ bytes, writes [\d,]+ bytes, at most", said, re.MULTILINE)) == 2
    ended = call(merge, *MERGE[1:], "--method=ties", "--processes=2", code=2)
    assert "--processes: works with --dry_run only" in ended.err
    assert not Path("out").exists()


# --------------------------------------------------------------------------------------------------------- examples


def put_stand_ins(folder: Path) -> dict[str, str]:
    """Programs of Slurm that start a job's two tasks on this machine, and `torchrun` as a program."""
    folder.mkdir()
    programs = {
        "scontrol": "echo 127.0.0.1",
        "srun": '"$@" & first=$!; "$@" & second=$!; wait $first && wait $second',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return {**ENV, "PATH": f"{folder}:{os.environ['PATH']}", "PORT": port}


@pytest.mark.slow
def test_the_slurm_job_runs(place: Path):
    flags = ["--method=ties", *MERGE[1:]]
    command(MERGE[0], *flags)
    expected = kept()
    (place / "merge.py").symlink_to(ROOT / "merge.py")
    env = put_stand_ins(place / "bin") | {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    subprocess.run(["bash", str(ROOT / "examples/slurm/merge.sbatch"), *flags], env=env, check=True, timeout=300)
    assert kept()["model.safetensors"] == expected["model.safetensors"]


@pytest.mark.slow
def test_the_kubernetes_job_runs(place: Path):
    service, job = yaml.safe_load_all((ROOT / "examples/kubernetes/merge.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert {entry["name"]: entry["value"] for entry in container["env"]} == {"HEAD": f"merge-0.{service['metadata']['name']}", "MODELS": "/models"}  # fmt: skip
    assert pod["subdomain"] == service["metadata"]["name"]
    flags = ["--method=ties", *MERGE[1:]]
    command(MERGE[0], *flags)
    expected = kept()
    (place / "merge.py").symlink_to(ROOT / "merge.py")
    env = put_stand_ins(place / "bin") | {"HEAD": "127.0.0.1", "MODELS": str(place / "in")}
    line = [text.replace("29500", env["PORT"]) for text in (*container["command"], *container["args"])]
    pods = [
        subprocess.Popen(line, env={**env, "JOB_COMPLETION_INDEX": str(index)})
        for index in range(job["spec"]["completions"])
    ]
    assert [each.wait(300) for each in pods] == [0, 0]
    assert (place / "in/merged/model.safetensors").read_bytes() == expected["model.safetensors"]


# -------------------------------------------------------------------------------------------------------- benchmarks


def test_the_scale_model_adds_up():
    cost = scale_model.Cost(1e-9, 2.0, measures=True)
    rates = scale_model.Rates(read=1e9, write=5e8, shared=4e9)
    # 2 s, beside (8 + 2) s of one thread 8 s of reading and 4 s of writing
    assert scale_model.predict(cost, rates, 8e9, 2e9, 1, 1) == pytest.approx(2 + 12)
    # a disk that takes no time
    assert scale_model.predict(cost, scale_model.Rates(1e99, 1e99), 8e9, 2e9, 1, 4) == pytest.approx(2 + 10 / 4)
    # four nodes of two threads; reading at 4 GB/s, writing at 2
    assert scale_model.predict(cost, rates, 8e9, 2e9, 4, 2) == pytest.approx(2 + 2 + 1)
    # sixteen: the shared file system gives no more; half of the work is one tensor
    assert scale_model.predict(cost, rates, 8e9, 2e9, 16, 2, 0.5) == pytest.approx(2 + 2 + 0.5)
    assert scale_model.predict(cost, rates, 8e9, 2e9, 16, 1, 0.5) == pytest.approx(2 + 10 * 0.5)
    point = {"method": "ties", "processes": 1, "threads": 1, "bytes_read": 3e9, "bytes_written": 1e9, "seconds": 6.5, "stream_s": 4.5, "cpu_s": 6.0}  # fmt: skip
    found = scale_model.costs_of([point, {**point, "method": "dare_ties"}])
    assert found["ties"] == scale_model.Cost(1e-9, 2.0, measures=True)
    assert not found["dare_ties"].measures
    assert scale_model.check([point], found, 1e9 / 3)
    assert not scale_model.check([{**point, "stream_s": 12.0}], found, 1e9 / 3)
