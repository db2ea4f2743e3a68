"""A run that was cut off goes on with what is finished, and its result is that of an undisturbed one, byte for byte."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import aim.calibrate
import merge
import performAIM
from aim.watcher import Watcher
from checkpoints.errors import WriteError
from checkpoints.folder import Folder
from checkpoints.journal import Journal
from checkpoints.save_path import partial_folder
from checkpoints.work_folder import STATE
from checkpoints.writer import CheckpointWriter
from forward.layerwise import Layerwise
from merging import make_recipe
from merging.kept_hidden import KeptHidden
from merging.merge_work import prepare
from streaming import commits
from streaming.output import RunOptions

INPUTS = Path(__file__).parent / "goldens" / "inputs"
TEXTS = INPUTS / "calib.jsonl.gz"
CALIBRATION = [f"--calibration_data={TEXTS}", "--n_samples=8", "--block_size=64"]
MERGE = ["--base_model=in/base", "--models_to_merge=in/math,in/code", "--save_path=out"]
RELAX = ["--merged_model=in/math", "--pretrained_model_name=in/base", "--save_path=out", *CALIBRATION]
RUNS = {
    "task_arithmetic": (merge.main, ["--method=task_arithmetic", *MERGE]),
    "ties": (merge.main, ["--method=ties", "--report=full", *MERGE]),
    "dare_ties": (merge.main, ["--method=dare_ties", "--max_shard_size=60kB", *MERGE]),
    "no digests": (merge.main, ["--method=linear", "--digest=none", *MERGE]),
    "one-run AIM": (merge.main, ["--method=dare_linear", "--omegas=0,0.4", *CALIBRATION, *MERGE]),
    "protect mean": (merge.main, ["--method=dare_linear", "--omegas=0,0.4", "--protect=mean", *CALIBRATION, *MERGE]),
    "regmean": (merge.main, ["--method=regmean", f"--model_data={TEXTS},{TEXTS}", "--data_tokens=200", *MERGE]),
    "performAIM": (performAIM.main, ["--omega=0.2", *RELAX]),
    "reference": (performAIM.main, ["--numerics=reference", *RELAX]),
}
Main = Callable[[list[str]], int]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the golden models in `in`; finished tensors are committed at once."""
    shutil.copytree(INPUTS, tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commits, "COMMIT_S", 0.0)
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def undisturbed(main: Main, argv: list[str]) -> dict[str, bytes]:
    """What the run writes, which is moved away."""
    assert main(argv) == 0
    written = content(Path("out"))
    shutil.rmtree("out")
    return written


def line(content: bytes) -> bytes:
    """A line of a journal, its digest right."""
    return hashlib.sha256(content).hexdigest()[:16].encode() + b" " + content + b"\n"


def records() -> list[dict]:
    with Folder.open(Path("out.partial") / STATE) as state:
        journal = Journal(state)
        journal.close()
    return journal.records


def cut_off(monkeypatch: pytest.MonkeyPatch, main: Main, argv: list[str], after: int, error: BaseException) -> int:
    """Run until `after` blocks are written and some tensor is committed, then fail in the next write; gives the exit code."""
    append, write = Journal.append, CheckpointWriter.write
    written: list[str] = []
    committed = threading.Event()

    def note(journal, record):
        append(journal, record)
        if "tensors" in record:
            committed.set()

    def fail(writer, name, *arguments):
        if len(written) >= after:
            assert committed.wait(60)
            raise error
        written.append(name)
        write(writer, name, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", note)
        patch.setattr(CheckpointWriter, "write", fail)
        return main([*argv, "--workers=1"])


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("after", [8, 16])
def test_a_run_goes_on_where_it_was(place, monkeypatch, capsys, name, after):
    main, argv = RUNS[name]
    expected = undisturbed(main, argv)
    assert cut_off(monkeypatch, main, argv, after, KeyboardInterrupt()) == 130
    assert "Run the same command again to go on" in capsys.readouterr().err
    assert not Path("out").exists()
    done = {tensor for record in records() for tensor in record.get("tensors", ())}
    written: set[str] = set()
    write = CheckpointWriter.write
    monkeypatch.setattr(CheckpointWriter, "write", lambda w, name, *rest: (written.add(name), write(w, name, *rest)))
    assert main(argv) == 0
    assert content(Path("out")) == expected
    assert not written & done
    assert not Path("out.partial").exists()


def test_a_run_cut_off_many_times(place, monkeypatch):
    main, argv = RUNS["ties"]
    expected = undisturbed(main, argv)
    for _ in range(3):
        assert cut_off(monkeypatch, main, argv, 4, KeyboardInterrupt()) == 130
    assert main(argv) == 0
    assert content(Path("out")) == expected


def test_a_full_disk_loses_nothing(place, monkeypatch, capsys):
    main, argv = RUNS["ties"]
    expected = undisturbed(main, argv)
    full = WriteError(Path("out.partial/model.safetensors"), OSError(28, "No space left on device"))
    assert cut_off(monkeypatch, main, argv, 8, full) == 1
    assert "No space left on device. Free space and run the same command again" in capsys.readouterr().err
    assert main(argv) == 0
    assert "going on: " in capsys.readouterr().err
    assert content(Path("out")) == expected


def test_a_disk_that_fails_when_flushed(place, monkeypatch, capsys):
    """In the thread that commits."""
    main, argv = RUNS["ties"]
    expected = undisturbed(main, argv)

    def fail(_: int) -> None:
        if threading.current_thread().name == "commits":
            raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        assert main(argv) == 1
    assert "Input/output error" in capsys.readouterr().err
    assert main(argv) == 0
    assert content(Path("out")) == expected


def test_an_input_error_leaves_nothing(place, monkeypatch):
    from checkpoints.errors import InputError

    main, argv = RUNS["ties"]
    assert cut_off(monkeypatch, main, argv, 8, InputError("a NaN")) == 1
    assert not Path("out.partial").exists()


CHANGES = {
    "lambda": (["--lambda=0.5"], "recipe.parameters.lambda (1.0 there, 0.5 here)"),
    "shards": (["--max_shard_size=60kB"], "files"),
    "report": (["--report=none"], "report"),
    "aim": (["--omega=0.4", *CALIBRATION], "aim"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_run_does_not_go_on_with_it(place, monkeypatch, capsys, name):
    main, argv = RUNS["task_arithmetic"]
    flags, says = CHANGES[name]
    expected = undisturbed(main, [*argv, *flags, "--no_resume"])
    assert cut_off(monkeypatch, main, argv, 8, KeyboardInterrupt()) == 130
    before = content(Path("out.partial"))
    capsys.readouterr()
    assert main([*argv, *flags]) == 1
    message = capsys.readouterr().err
    assert f"out.partial: holds an unfinished run that differs in {says}" in message
    assert "--no_resume to begin anew" in message
    assert content(Path("out.partial")) == before
    assert main([*argv, *flags, "--no_resume"]) == 0
    assert content(Path("out")).keys() == expected.keys()


def test_an_input_that_changed_is_not_gone_on_with(place, monkeypatch, capsys):
    main, argv = RUNS["task_arithmetic"]
    assert cut_off(monkeypatch, main, argv, 8, KeyboardInterrupt()) == 130
    os.utime("in/math/model.safetensors")
    assert main(argv) == 1
    assert "inputs[1].files.model.safetensors.mtime_ns" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["task_arithmetic", "one-run AIM", "performAIM"])
def test_a_complete_result_is_not_made_again(place, monkeypatch, capsys, name):
    main, argv = RUNS[name]
    assert main(argv) == 0
    before = content(Path("out"))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "__init__", lambda *_, **__: pytest.fail("it was made again"))
        assert main(argv) == 0
    assert capsys.readouterr().out.startswith("out: is complete already")
    assert content(Path("out")) == before
    (Path("out") / next(name for name in before if name.endswith("model.safetensors"))).unlink()
    assert main(argv) == 2
    assert "not empty" in capsys.readouterr().err
    assert main([*argv, "--overwrite"]) == 0
    assert content(Path("out")).keys() == before.keys()


def test_a_crash_before_the_last_rename(place, monkeypatch, capsys):
    main, argv = RUNS["one-run AIM"]
    expected = undisturbed(main, argv)
    rename = os.rename

    def fail(source, target, **keywords):
        if Path(target).name == "out":
            raise KeyboardInterrupt
        rename(source, target, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        assert main(argv) == 130
    assert main(argv) == 0
    assert "is complete now; an earlier run had left only its renaming to do" in capsys.readouterr().out
    assert content(Path("out")) == expected


def test_a_torn_line_is_cut_off(tmp_path):
    path = tmp_path / "journal"
    folder = Folder.open(tmp_path)
    journal = Journal(folder)
    journal.append({"tensors": {"a": []}})
    journal.append({"tensors": {"b": []}})
    journal.close()
    whole = path.read_bytes()
    first = whole.splitlines(keepends=True)[0]
    for torn in (
        whole[:-1],
        whole[: len(first) + 5],
        first + b"0" * 40 + b"\n",
        first + whole[len(first) :].replace(b'"b"', b'"c"'),
        first + line(b"[" * 100_000),
        first + line(b"[1]"),
        first + line(b"1" * 5000),
    ):
        path.write_bytes(torn)
        journal = Journal(folder)
        assert journal.records == [{"tensors": {"a": []}}]
        journal.append({"blocks": 3})
        journal.close()
        again = Journal(folder)
        again.close()
        assert again.records == [{"tensors": {"a": []}}, {"blocks": 3}]
    folder.close()


def test_a_calibration_goes_on_where_it_was(place, monkeypatch, capsys):
    main, argv = RUNS["performAIM"]
    expected = undisturbed(main, argv)
    observed: list[int] = []
    keep = aim.calibrate.UnfinishedCalibration.keep

    def fail(self, watcher, blocks):
        keep(self, watcher, blocks)
        observed.append(blocks)
        if blocks == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(aim.calibrate.UnfinishedCalibration, "keep", fail)
        assert main(argv) == 130
    assert [record["blocks"] for record in records() if "blocks" in record] == [1, 2]
    watched: list[int] = []
    restore = Watcher.restore
    monkeypatch.setattr(Watcher, "restore", lambda self, sums: (watched.append(1), restore(self, sums)))
    assert main(argv) == 0
    assert watched
    assert content(Path("out")) == expected


@pytest.mark.parametrize("fits", [True, False])
def test_a_calibration_layer_by_layer_goes_on_at_its_layer(place, monkeypatch, capsys, fits):
    """`fits`: what is kept is what the layer is called with; else the pass begins again."""
    main, argv = RUNS["performAIM"]
    argv = [*argv, "--calibration_mode=layerwise"]
    expected = undisturbed(main, argv)
    keep, advance = aim.calibrate.UnfinishedCalibration.keep_layer, Layerwise.advance

    def fail(self, *arguments):
        keep(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(aim.calibrate.UnfinishedCalibration, "keep_layer", fail)
        assert main(argv) == 130
    assert [record["layer"] for record in records() if "layer" in record] == [0]
    advanced: list[int] = []
    monkeypatch.setattr(Layerwise, "advance", lambda self: (advanced.append(self.at), advance(self))[1])
    if not fits:
        monkeypatch.setattr(Layerwise, "restore", lambda self, batches, tensors: False)
    assert main(argv) == 0
    assert advanced == ([1] if fits else [0, 1])  # of two layers
    err = capsys.readouterr().err
    assert ("begun again" in err) is not fits
    assert ("going on at layer 2 of 2" in err) is fits
    assert content(Path("out")) == expected


@pytest.mark.parametrize("fits", [True, False])
def test_a_merge_by_inputs_goes_on_at_its_layer(place, monkeypatch, fits):
    """`fits`: what is kept can be gone on with; else the layers are run again, and merged no more than once."""
    main, argv = RUNS["regmean"]
    expected = undisturbed(main, argv)
    keep, advance = KeptHidden.keep, Layerwise.advance

    def fail(self, *arguments):
        keep(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(KeptHidden, "keep", fail)
        assert main(argv) == 130
    assert [record["before_layer"] for record in records() if "before_layer" in record] == [1]
    advanced: list[int] = []
    monkeypatch.setattr(Layerwise, "advance", lambda self: (advanced.append(self.at), advance(self))[1])
    if not fits:
        monkeypatch.setattr(Layerwise, "restore", lambda self, batches, tensors: False)
    written: set[str] = set()
    write = CheckpointWriter.write
    monkeypatch.setattr(CheckpointWriter, "write", lambda w, name, *rest: (written.add(name), write(w, name, *rest)))
    assert main(argv) == 0
    assert advanced == ([1, 1] if fits else [0, 0, 1, 1])  # of two layers, in two models
    assert written == {name for name in written if ".layers.1." in name}
    assert content(Path("out")) == expected


def test_the_state_is_no_checkpoint(place, monkeypatch):
    """Nothing loads it by mistake."""
    from transformers import AutoModelForCausalLM

    main, argv = RUNS["ties"]
    assert cut_off(monkeypatch, main, argv, 8, KeyboardInterrupt()) == 130
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained("out.partial")


def test_the_identity_is_json_and_says_what_was_read(place):
    recipe = make_recipe("ties", "in/base", "in/math,in/code")
    job = prepare(recipe, Path("out"), RunOptions())
    identity = json.loads(json.dumps(job.identity))
    assert [entry["model"] for entry in identity["inputs"]] == ["in/base", "in/math", "in/code"]
    assert partial_folder(Path("out")).name == "out.partial"
    job.close()
