"""benchmarks/: what merge_speed.py measures with, makes and writes. No figure that it measures is asserted."""

import dataclasses
import json
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_parts, lock_share, measured, merge_speed, speed_report
from benchmarks.early_stopping import CALIBRATED, difference, mean
from benchmarks.floor import move
from benchmarks.peer import Mergekit
from benchmarks.speed_results import Results, Row, Setting, load, note_compared
from benchmarks.synthetic import COMPLETE, DELTA_SCALES, Checkpoints, Shape, make_checkpoints, weight_files
from checkpoints.model import open_model
from checkpoints.reader import read_tensor
from merging.methods import METHODS
from merging.recipe_flags import make_recipe
from streaming.machine_code import can_compile

ROOT = Path(__file__).resolve().parent.parent
TINY = Shape(hidden=64, layers=2, intermediate=128, heads=4, kv_heads=2, vocabulary=320)
SETTING = Setting(1_100_000_000, 3, 2)
HOLD = "import time; held = b'x' * {}; time.sleep(1.5)"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Checkpoints:
    """A base and two fine-tunes of it."""
    return make_checkpoints(tmp_path_factory.mktemp("models"), TINY, 2, say=lambda line: None)


def merge_flags(tiny: Checkpoints, out: Path) -> list[str]:
    models = ",".join(map(str, tiny.fine_tunes))
    flags = ["--method", "linear", "--base_model", str(tiny.base), "--models_to_merge", models]
    return ["merge.py", *flags, "--save_path", str(out), "--digest", "none"]


# ---------------------------------------------------------------------------------------------------- a measured run


@pytest.mark.skipif(sys.platform != "linux", reason="memory is sampled from /proc")
def test_memory_of_a_process_and_of_what_it_starts_is_added_up():
    own, childs = 60_000_000, 90_000_000
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {HOLD.format(childs)!r}])"
    run = measured.run([sys.executable, "-c", f"{child}; {HOLD.format(own)}"])
    assert own + childs < run.peak_bytes < own + childs + 60_000_000


def test_a_run_keeps_what_was_printed_and_counts_processor_time():
    run = measured.run([sys.executable, "-c", "import os; print(os.environ['GREETING'])"], env={"GREETING": "hello"})
    assert run.stdout == "hello\n"
    assert run.cpu_seconds > 0
    assert run.seconds > 0


def test_a_run_that_fails_says_what_it_said_last():
    command = [sys.executable, "-c", "import sys; sys.exit('the disk is full')"]
    with pytest.raises(measured.CommandFailed, match=r"exit code 1: .*\nthe disk is full"):
        measured.run(command)
    assert measured.run(command, accept=(1,)).stdout == ""


# ------------------------------------------------------------------------------------------------------- the floor


def test_the_floor_reads_every_byte_and_writes_every_byte(tmp_path):
    sizes = (0, 1, 700_000)
    inputs = [tmp_path / f"{size}.in" for size in sizes]
    for path, size in zip(inputs, sizes, strict=True):
        path.write_bytes(b"\xff" * size)
    outputs = [tmp_path / "a.out", tmp_path / "b.out"]
    moved = move(inputs, outputs, 300_000, threads=2)
    assert moved["bytes_read"] == sum(sizes)
    assert moved["bytes_written"] == 600_000
    assert 0 < moved["unflushed_s"] <= moved["seconds"]
    assert [path.stat().st_size for path in outputs] == [300_000, 300_000]


# ------------------------------------------------------------------------------------------------------- the models


def test_synthetic_models_are_whole_and_differ_as_stated(tiny):
    base = open_model(str(tiny.base))
    assert (base.architecture.missing, base.architecture.unplaced, base.architecture.mismatched) == ((), (), {})
    assert TINY.parameters == sum(info.numel for info in base.weights.tensors.values())
    assert len(weight_files([tiny.base])) in (2, 3)
    tuned = [open_model(str(folder)) for folder in tiny.fine_tunes]
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        stored = read_tensor(base.weights, name).float()
        for model, size in zip(tuned, DELTA_SCALES, strict=False):
            delta = read_tensor(model.weights, name).float() - stored
            assert float(delta.norm() / stored.norm()) == pytest.approx(size, rel=0.4)  # few runs, which differ in size
    assert base.vocabulary.size == TINY.vocabulary
    assert base.vocabulary_digest == tuned[0].vocabulary_digest


def test_models_are_made_once_and_what_is_half_made_again(tmp_path):
    made = make_checkpoints(tmp_path, TINY, 1, say=lambda line: None)
    assert made.missing_bytes == 0
    files = weight_files([made.base, *made.fine_tunes])
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    (made.fine_tunes[0] / COMPLETE).unlink()
    assert made.missing_bytes == 2 * TINY.parameters
    said: list[str] = []
    make_checkpoints(tmp_path, TINY, 1, say=said.append)
    assert len(said) == 1
    for path in files:
        assert path.read_bytes() == before[path][1]
        assert (path.stat().st_mtime_ns == before[path][0]) == (path.parent == made.base)


def test_scaling_widens():
    assert Shape().scaled(1) == Shape()
    quarter = Shape().scaled(0.25)
    assert quarter == Shape(hidden=1024, intermediate=2816, heads=16)
    assert 3 < Shape().parameters / quarter.parameters < 4
    assert Shape().scaled(4).head == Shape().head


# -------------------------------------------------------------------------------------------- looking from the inside


def observed(what: str, flags: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/observed.py"), what, "0", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_first_read_is_seen_and_nothing_is_left(tiny, tmp_path):
    done = observed("first_byte", merge_flags(tiny, tmp_path / "out"))
    assert done.returncode == 1
    assert json.loads(done.stdout.splitlines()[-1])["seconds"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not can_compile(), reason="no LLVM")
def test_the_first_read_of_a_loop_is_seen(tmp_path):
    """Which calls the C library's pread, and not Python's."""
    program = tmp_path / "program.py"
    program.write_text(
        "import torch\n"
        "from streaming.loops import write_loop\n"
        "from streaming.machine_code import COMPILER\n"
        "from streaming.trace import NOT_READ, Store, Trace\n"
        "trace = Trace([torch.float32], has_base=False, is_delta=False)\n"
        "text = lambda: write_loop(trace, [Store(trace.models[0], torch.float32)])\n"
        "assert COMPILER.get('a loop', text)(0, 0, 0) == NOT_READ\n"
    )
    done = observed("first_byte", [str(program)])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["seconds"] > 0


def test_a_profile_names_functions_of_ours(tiny, tmp_path):
    done = observed("profile", merge_flags(tiny, tmp_path / "out"))
    assert done.returncode == 0
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["samples"] == 0 or sum(found["shares"].values()) == pytest.approx(1)
    assert (tmp_path / "out" / "model.safetensors").is_file()


# ---------------------------------------------------------------------------------------------------------- the lock


def test_a_share_is_processor_time_outside_of_calls_that_let_go_of_the_lock():
    clock = lock_share.Clock()

    def spin(seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    freely = clock.free(spin)
    freely(0.02)  # outside of a block it counts for nothing
    assert (clock.blocks, clock.free_s, clock.share) == (0, 0.0, 0.0)
    for _ in range(2):
        clock.block(lambda: (spin(0.01), freely(0.05), time.sleep(0.05)))()
    assert clock.blocks == 2
    assert clock.free_s == pytest.approx(0.1, rel=0.05)
    assert clock.cpu_s - clock.free_s == pytest.approx(0.02, abs=0.01)
    assert clock.share == pytest.approx((clock.cpu_s - clock.free_s) / clock.wall_s)
    with pytest.raises(ZeroDivisionError):
        clock.block(lambda: 1 / 0)()
    assert clock.blocks == 3


@pytest.mark.skipif(not can_compile(), reason="no LLVM")
def test_lock_share_measures_each_method_with_each_number_of_workers(tmp_path, capsys):
    sizes = [f"--{field.name}={getattr(TINY, field.name)}" for field in dataclasses.fields(TINY)]
    lock_share.main([f"--folder={tmp_path}", "--methods=linear,ties", "--workers=1,2", "--repeats=1", *sizes])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["method"], row["workers"]) for row in rows] == [("linear", 1), ("linear", 2), ("ties", 1), ("ties", 2)]
    assert all(0 < row["share"] <= 1 and row["blocks"] > 0 and row["block_ms"] > 0 for row in rows)
    assert rows[0]["faster"] == rows[2]["faster"] == 1
    assert rows[2]["blocks"] > rows[0]["blocks"]  # ties reads twice
    assert not (tmp_path / "lock").exists()


# ---------------------------------------------------------------------------------------------------------- the peer


def test_what_stopping_changes_is_paired_by_document_and_domains_weigh_the_same():
    """Domain a: differences .2 and .4, mean .3, variance .02; b: .1, .1, .1. Error: sqrt(.02 / 2 / 4 + 0)."""
    ours = {"a": [1.2, 2.4], "b": [1.1, 2.1, 3.1]}
    theirs = {"a": [1.0, 2.0], "b": [1.0, 2.0, 3.0]}
    assert mean(theirs) == pytest.approx(1.75)
    change, error = difference(ours, theirs)
    assert (change, error) == (pytest.approx(0.2), pytest.approx(0.05))
    assert CALIBRATED.search("calibrated on 16,384 tokens in 3.59 s, 9,986 tokens/s")[1] == "16,384"


def test_mergekit_gets_our_recipe(tmp_path):
    recipe = make_recipe("ties", "base", "a,b").as_json()
    command = Mergekit(tmp_path).command(recipe, tmp_path / "r.yml", tmp_path / "out", with_base=True)
    assert command == [str(tmp_path / "bin/mergekit-yaml"), str(tmp_path / "r.yml"), str(tmp_path / "out")]
    assert json.loads((tmp_path / "r.yml").read_text()) == {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": name, "parameters": {"weight": 1.0, "density": 0.5}} for name in ("a", "b")],
        "parameters": {"lambda": 1.0, "normalize": True},
        "dtype": "bfloat16",
    }
    Mergekit(tmp_path).command(recipe, tmp_path / "r.yml", tmp_path / "out", with_base=False)
    assert "base_model" not in json.loads((tmp_path / "r.yml").read_text())


# ------------------------------------------------------------------------------------------------ results and tables


FLOOR, MERGE = "floor: 4 read, 1 written", speed_report.MERGE


def row(kind: str, case: str, setting: Setting = SETTING, **values: list[float]) -> Row:
    return Row(kind, case, setting, floor=FLOOR, other=MERGE, values=values)


def made_up_results() -> Results:
    moved = {"bytes_read": [8e9], "bytes_written": [2e9]}
    large = [
        row("floor", FLOOR, seconds=[2.0, 4.0, 3.0], stream_s=[1.0, 1.0, 1.0], **moved),
        row("merge", MERGE, seconds=[2.8, 8.0, 3.9], stream_s=[2.6, 7.0, 4.8], peak_bytes=[2e8], **moved),
        row("merge", speed_report.DIGEST, seconds=[3.0, 9.0, 4.0], peak_bytes=[6e8], **moved),
        row("peer", MERGE, seconds=[28.0, 16.0, 39.0], peak_bytes=[4e9]),
        row("calibration", "bfloat16", bare_tokens_s=[100.0], watched_tokens_s=[92.0], share=[0.92]),
        row("start", "merge.py --help", seconds=[0.4]),
    ]
    note_compared(large)
    small = row("merge", MERGE, Setting(300_000_000, 3, 2), seconds=[1.0], peak_bytes=[1e8], **moved)
    return Results("a machine", [*large, small])


def test_tables_give_medians_of_ratios_and_say_whether_targets_are_met():
    lines = speed_report.as_markdown(made_up_results()).splitlines()
    assert lines[0] == "Machine: a machine."

    def cells(start: str, number: int = 0) -> list[str]:
        found = [line for line in lines if line.startswith(f"| {start} |")]
        return [cell.strip() for cell in found[number].strip("|").split("|")]

    # Rounds: 2.8 / 2, 8 / 4 and 3.9 / 3 times the floor, of which 1.4 is the median; 3.9 s is that of the times.
    merge = cells("task_arithmetic")
    assert merge[3] == "3.90 s"
    assert merge[6] == "1.40"
    # Streaming: 2.6 / 2, 7 / 4 and 4.8 / 3, of which 1.6 is the median.
    assert merge[7] == "1.60"
    assert merge[-1] == "1.5 x floor: missed; 0.3 GB: met"
    # 3 / 2.8, 9 / 8 and 4 / 3.9: the median is 1.07.
    assert cells("task_arithmetic, default digest")[-1] == "1.1 x task_arithmetic: 1.07, met; 0.3 GB: missed"
    # Below a billion parameters only memory has a target; from 0.3 to 1.1 billion it doubles.
    assert cells("task_arithmetic", 1)[-1] == "0.3 GB: met"
    assert cells("task_arithmetic", 2)[-2:] == ["2.000", "1.1: missed"]
    assert cells("task_arithmetic", 3)[-1] == "6 x: met"  # 10, 2 and 10 times faster
    assert cells("bfloat16")[-1] == "90%: met"
    assert cells("merge.py --help")[-1] == "0.3 s: missed"


def test_every_target_is_of_something_that_is_measured():
    assert set(speed_report.PEER_TARGETS) <= set(METHODS)
    assert set(speed_report.FLOOR_TARGETS) <= {*METHODS, speed_report.AIM, "performAIM"}
    assert speed_report.MERGE in METHODS


def test_a_later_run_replaces_its_own_rows_and_keeps_the_others(tmp_path):
    results = made_up_results()
    results.put([row("merge", MERGE, seconds=[1.0]), row("merge", "ties", seconds=[2.0])])
    results.save(tmp_path / "results.json")
    again = load(tmp_path / "results.json")
    assert again == results
    assert again.find("merge", MERGE, SETTING).values == {"seconds": [1.0]}
    assert len(again.rows) == len(made_up_results().rows) + 1
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="expected results of merge_speed"):
        load(tmp_path / "other.json")


def test_a_ratio_is_of_one_run_whatever_is_measured_later():
    results = made_up_results()
    results.put([row("floor", FLOOR, seconds=[1000.0]), row("merge", MERGE, seconds=[1000.0])])
    digest = results.find("merge", speed_report.DIGEST, SETTING)
    assert digest.times("floor_s") == pytest.approx(1.5)
    assert digest.times("other_s") == pytest.approx(3 / 2.8)


def test_a_page_keeps_its_prose(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"Before.\n{speed_report.BEGIN}\nold\n{speed_report.END}\nAfter.\n")
    speed_report.put_into_page(page, "new")
    assert page.read_text() == f"Before.\n{speed_report.BEGIN}\n\nnew\n\n{speed_report.END}\nAfter.\n"
    page.write_text("No marks.\n")
    with pytest.raises(ValueError, match="expected the marks"):
        speed_report.put_into_page(page, "new")
    assert page.read_text() == "No marks.\n"


def test_the_page_has_the_marks():
    content = (ROOT / "docs/performance.md").read_text()
    assert content.count(speed_report.BEGIN) == content.count(speed_report.END) == 1


# ------------------------------------------------------------------------------------------------------- the command


def error_of(capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as ended:
        merge_speed.main(list(flags))
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_folder_with_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "holds something else" in error_of(capsys, "--folder", str(tmp_path), "--quick")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "tties"], "--methods: expected any of"),
        (["--parts", "everything"], "--parts: expected any of"),
        (["--scale", "0"], "--scale: expected numbers above 0"),
        (["--models", "two"], "--models: expected numbers above 0"),
        (["--cores", "4096"], "--cores: expected at most"),
        (["--repeats", "-1"], "--repeats: expected at least 1"),
        (["--heads", "7"], "--hidden is an even multiple of --heads"),
    ],
)
def test_flags_that_are_wrong(tmp_path, capsys, flags, message):
    folder = tmp_path / "folder"
    assert message in error_of(capsys, "--folder", str(folder), *flags)
    assert not folder.exists()


def test_too_little_disk_is_said_before_anything_is_made(tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(merge_speed.shutil, "disk_usage", lambda folder: usage(1_000_000))
    assert "not enough disk" in error_of(capsys, "--folder", str(tmp_path), "--quick")
    assert [path.name for path in tmp_path.iterdir()] == [merge_speed.MARKER]


@pytest.mark.slow
def test_quick_from_start_to_page(tmp_path, capsys):
    folder, page = tmp_path / "folder", tmp_path / "page.md"
    page.write_text(f"{speed_report.BEGIN}{speed_report.END}")
    flags = ["--quick", "--methods", "linear", "--models", "2", "--update_docs", str(page)]
    assert merge_speed.main(["--folder", str(folder), *flags]) == 0
    printed = capsys.readouterr().out
    assert "\n| floor: 2 read, 1 written |" in printed  # linear does not read the base
    assert "\n| linear |" in printed
    found = load(folder / "results.json")
    assert [(one.kind, one.case) for one in found.rows] == [
        ("floor", "floor: 2 read, 1 written"),
        ("merge", "linear"),
    ]
    moved = found.rows[1].values
    assert moved["bytes_read"] == [pytest.approx(2 * moved["bytes_written"][0], rel=0.01)]
    assert moved["bytes_written"] == [pytest.approx(2 * merge_speed.QUICK.parameters, rel=0.01)]
    figures = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert figures == ["merge_speed_memory.svg", "merge_speed_time.svg"]
    assert all(name in page.read_text() for name in ("| linear |", *figures))
    assert sorted(path.name for path in folder.iterdir()) == [merge_speed.MARKER, "models", "results.json"]

    assert merge_speed.main(["--folder", str(folder), "--render"]) == 0
    assert capsys.readouterr().out == printed


# ------------------------------------------------------------------------------------------------------- on a GPU


def test_what_the_gpu_benchmark_cannot_measure_has_a_row_that_says_why(tmp_path):
    """Each part begins with what is left of its minutes, and says so where that is nothing; the JSON is whole all the same."""
    out = tmp_path / "gpu.json"
    assert gpu.main(["--dry", "--minutes", "0", "--folder", str(tmp_path / "models"), "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [row["part"] for row in found["rows"]] == [*gpu.PARTS, "end"]
    reasons = {row["part"]: row["not_measured"] for row in found["rows"][:-1]}
    assert set(reasons.values()) - {"mergekit is not installed"} == {"the minutes are over"}
    assert found["machine"]["card"] == {"name": "none"}


def test_the_gpu_benchmark_says_where_pytest_is_missing(tmp_path, monkeypatch):
    """It is not among what a user installs."""
    monkeypatch.setattr(gpu_parts.importlib.util, "find_spec", lambda name: None)
    bench = gpu_parts.Bench(tmp_path, "cpu", time.monotonic() + 300, gpu_parts.SMALL)
    assert list(gpu_parts.tests(bench)) == [{"not_measured": "pytest is not installed"}]


@pytest.mark.slow
def test_the_gpu_benchmark_runs_commands_on_its_device_and_reads_what_they_say(tmp_path, tiny):
    """With small models on the CPU, as --dry has it."""
    small = dataclasses.replace(gpu_parts.SMALL, middle=TINY)
    bench = gpu_parts.Bench(tmp_path, "cpu", time.monotonic() + 300, small)
    row = bench.command(merge_flags(tiny, tmp_path)[:-4], "cpu")
    assert (row["device"], row["gpu_peak_bytes"]) == ("cpu", 0)
    assert row["bytes_written"] > 0
    assert not (tmp_path / "out").exists()
    rows = list(gpu_parts.equality(dataclasses.replace(bench, sizes=dataclasses.replace(small, equal=TINY))))
    assert {row["method"] for row in rows} == {name for name in METHODS if name != "regmean"}
    assert sum(row["differ"] for row in rows) == 0


def test_a_run_that_takes_too_long_is_ended_with_all_it_started():
    child = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).wait()"
    )
    with pytest.raises(measured.CommandFailed, match="stopped after 1 s"):
        measured.run([sys.executable, "-c", child], seconds_at_most=1)
