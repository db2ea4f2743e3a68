"""Several processes that share one run: the same bytes as one, whatever their number; gone on with by any number; one message where one fails.

Most tests run the processes as threads of this one, which meet in a store in memory: everything but the start is as under torchrun.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from checkpoints.errors import InputError, WriteError
from checkpoints.journal import Journal
from checkpoints.process import Launch, launch_of
from checkpoints.save_path import partial_folder
from checkpoints.work_folder import STATE
from checkpoints.writer import CheckpointWriter
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
from tests.scene import snapshot

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


# ------------------------------------------------------------------------------------------------------------- AIM


@pytest.mark.parametrize(
    ("count", "flags"),
    [
        (2, {"mode": "whole", "tolerance": 0.0}),
        (3, {"mode": "whole"}),
        (2, {"mode": "layerwise"}),
    ],
)
def test_processes_calibrate_together_and_relax_in_shares(place: Path, count: int, flags: dict[str, Any]):
    from aim import AimRequest
    from aim.calibration_run import CalibrationOptions
    from aim.calibration_text import CalibrationData
    from aim.choices import Calibration, Relaxing

    data = CalibrationData(str(INPUTS / "calib.jsonl.gz"), n_samples=40, block_size=64)
    kinds = CalibrationOptions(device=torch.device("cpu"), dtype="float32", batch_size=1, **flags)

    def job(options: RunOptions, name: str) -> Job:
        request = AimRequest(Relaxing(), Calibration(data, kinds), save_activations=Path(f"{name}.safetensors"))
        step = request.step(Path("out"), options)
        return prepare(make_recipe("dare_linear", "in/base", "in/math,in/code"), Path("out"), options, step=step)

    job(SMALL, "alone").run()
    expected = kept()
    results = together(count, lambda joined: job(replace(SMALL, processes=joined), "together").run())
    assert [type(result).__name__ for result in results] == ["Result"] * count, results
    same_but_time(kept(), expected)
    assert (place / "together.safetensors").read_bytes() == (place / "alone.safetensors").read_bytes()
