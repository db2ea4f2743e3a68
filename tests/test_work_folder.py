"""What lies in a work folder is looked at before it is gone on with, never followed out of it, and published only if a run wrote it."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

import merge
from checkpoints import folder as folder_module
from checkpoints.errors import InputError
from checkpoints.files import write_text
from checkpoints.folder import Folder, ForeignFolder
from checkpoints.staging import staged
from checkpoints.work_folder import MARKER, RUN, STATE
from checkpoints.writer import CheckpointWriter
from tests.test_resume import MERGE, RUNS, content, cut_off, line, place, records, undisturbed  # noqa: F401

WORK = Path("out.partial")
Main = Callable[[list[str]], int]


@pytest.fixture(autouse=True)
def in_place(place: Path) -> Path:  # noqa: F811
    """The golden models in `in`, and tensors committed at once."""
    return place


def cut(
    monkeypatch: pytest.MonkeyPatch, name: str = "ties", after: int = 12
) -> tuple[Main, list[str], dict[str, bytes]]:
    """Leave a run cut off. Returns: how to go on with it, and what an undisturbed one writes."""
    main, argv = RUNS[name]
    expected = undisturbed(main, argv)
    assert cut_off(monkeypatch, main, argv, after, KeyboardInterrupt()) == 130
    return main, argv, expected


def flip(path: Path) -> None:
    """Change a byte of the first tensor."""
    raw = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(raw[:8], "little")
    for at in range(begin, len(raw), 64):
        raw[at] ^= 1
    path.write_bytes(raw)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "cut short": lambda path: os.truncate(path, 700),
    "cut short and filled up": lambda path: (
        size := path.stat().st_size,
        os.truncate(path, 700),
        os.truncate(path, size),
    ),
    "changed": flip,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "header": lambda path: path.write_bytes(bytes(8) + path.read_bytes()[8:]),
}


@pytest.mark.parametrize("name", ["dare_ties", "no digests", "one-run AIM", "performAIM"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_files_that_are_not_as_they_were_written_are_made_again(monkeypatch, capsys, name, damage):
    main, argv, expected = cut(monkeypatch, name, 40 if name == "one-run AIM" else 16)
    path = min(WORK.rglob("model*.safetensors"))
    DAMAGE[damage](path)
    capsys.readouterr()
    assert main(argv) == 0
    assert content(Path("out")) == expected
    err = capsys.readouterr().err
    assert ("made again" in err) == (damage not in ("longer", "header"))


def test_only_what_does_not_fit_is_made_again(monkeypatch, capsys):
    main, argv, expected = cut(monkeypatch, "dare_ties", 16)
    done = {tensor for record in records() for tensor in record.get("tensors", ())}
    shards = sorted({file for record in records() for places in record["written"].values() for file, _ in places})
    assert len(shards) > 1
    inside = {name for record in records() for name, [(file, _)] in record["written"].items() if file == shards[0]}
    (WORK / shards[0]).unlink()
    written: set[str] = set()
    write = CheckpointWriter.write
    monkeypatch.setattr(CheckpointWriter, "write", lambda w, name, *rest: (written.add(name), write(w, name, *rest)))
    capsys.readouterr()
    assert main(argv) == 0
    assert written & done == inside
    err = capsys.readouterr().err
    assert f"{len(inside)} tensor" in err
    assert f"going on: {len(done - inside)} of" in err
    assert content(Path("out")) == expected


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("activations.safetensors", "going on: 6 of 6 blocks are there"),
        ("*.safetensors", "calibration is not as it wrote it, and is made again"),
    ],
)
def test_a_calibration_that_is_not_as_it_was_kept_is_made_again(monkeypatch, capsys, pattern, says):
    main, argv, expected = cut(monkeypatch, "performAIM", 8)
    for path in (WORK / STATE).glob(pattern):
        flip(path)
    capsys.readouterr()
    assert main(argv) == 0
    assert says in capsys.readouterr().err
    assert content(Path("out")) == expected


def as_before_checksums() -> None:
    """Make the work folder what the version before wrote: no marker, no checksums."""
    (WORK / STATE / MARKER).unlink()
    lines = []
    for record in records():
        for key in ("written", "file", "xxh3"):
            record.pop(key, None)
        lines.append(line(json.dumps(record).encode()))
    (WORK / STATE / "journal").write_bytes(b"".join(lines))
    WORK.chmod(0o755)


@pytest.mark.parametrize("name", ["ties", "performAIM"])
def test_a_work_folder_of_an_earlier_version_is_gone_on_with(monkeypatch, capsys, name):
    main, argv, expected = cut(monkeypatch, name)
    as_before_checksums()
    capsys.readouterr()
    assert main(argv) == 0
    assert "without a checksum" in capsys.readouterr().err
    assert content(Path("out")) == expected


def test_a_work_folder_of_an_earlier_version_for_another_command(monkeypatch, capsys):
    main, argv, _ = cut(monkeypatch)
    as_before_checksums()
    before = content(WORK)
    capsys.readouterr()
    assert main([*argv, "--lambda=0.5"]) == 1
    assert "holds an unfinished run that differs in recipe.parameters.lambda" in capsys.readouterr().err
    assert content(WORK) == before
    assert main([*argv, "--lambda=0.5", "--no_resume"]) == 0


# --------------------------------------------------------------------------------------------- what others put there

PLANTED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a link for a shard": ("model.safetensors", lambda path: (path.unlink(), path.symlink_to("../victim"))),
    "a link at the card": ("README.md", lambda path: path.symlink_to("../victim")),
    "a link to nothing": ("merge_recipe.json", lambda path: path.symlink_to("../nowhere")),
    "a hard link": ("config.json", lambda path: os.link("victim", path)),
    "a pipe": ("generation_config.json", os.mkfifo),
    "a program": ("evil.py", lambda path: path.write_text("{}")),
    "an adapter": ("adapter_config.json", lambda path: path.write_text("{}")),
    "weights": ("pytorch_model.bin", lambda path: path.write_text("{}")),
    "more weights": ("model-00007-of-00009.safetensors", lambda path: path.write_text("{}")),
    "a folder": ("more", Path.mkdir),
    "a link to a folder": ("more", lambda path: path.symlink_to("..")),
    "a folder for a file": ("config.json", lambda path: (path.mkdir(), (path / "x").touch())),
    "a link for the journal": (f"{STATE}/journal", lambda path: (path.unlink(), path.symlink_to("../../victim"))),
    "a pipe for the journal": (f"{STATE}/journal", lambda path: (path.unlink(), os.mkfifo(path))),
    "a link for run.json": (f"{STATE}/{RUN}", lambda path: (path.unlink(), path.symlink_to("../../victim"))),
    "a pipe for the mark": (f"{STATE}/{MARKER}", lambda path: (path.unlink(), os.mkfifo(path))),
    "a hard link in the state": (f"{STATE}/calibration.safetensors", lambda path: os.link("victim", path)),
    "the state is a link": (STATE, lambda path: (shutil.move(path, "state"), path.symlink_to("../state"))),
}


def listing(folder: Path) -> list[tuple[str, int, int]]:
    return [(str(path), path.lstat().st_mode, path.lstat().st_ino) for path in sorted(folder.rglob("*"))]


@pytest.mark.parametrize("what", PLANTED)
def test_what_no_run_put_there_is_refused_by_name(monkeypatch, capsys, what):
    main, argv, expected = cut(monkeypatch)
    Path("victim").write_text("precious")
    name, plant = PLANTED[what]
    plant(WORK / name)
    before = listing(WORK)
    for more in ([], ["--no_resume"]):
        capsys.readouterr()
        assert main([*argv, *more]) == 1
        message = capsys.readouterr().err
        assert "out.partial: holds " in message
        assert name in message
        assert "no run of ours put there" in message
    assert Path("victim").read_text() == "precious"
    assert listing(WORK) == before
    assert not Path("out").exists()
    if what in ("a program", "a folder"):
        (WORK / name).unlink() if (WORK / name).is_file() else (WORK / name).rmdir()
        assert main(argv) == 0
        assert content(Path("out")) == expected


def test_what_is_put_there_during_the_run_is_not_published(monkeypatch, capsys):
    main, argv = RUNS["ties"]
    close = CheckpointWriter.close

    def plant(writer):
        (WORK / "evil.py").write_text("")
        return close(writer)

    monkeypatch.setattr(CheckpointWriter, "close", plant)
    assert main(argv) == 1
    assert "out.partial: holds evil.py, which no run of ours put there" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_link_that_appears_during_the_run_is_not_followed(monkeypatch):
    main, argv = RUNS["ties"]
    expected = undisturbed(main, argv)
    Path("victim").write_text("precious")
    close = CheckpointWriter.close

    def plant(writer):
        for name in ("README.md", "config.json", "merge_recipe.json"):
            (WORK / name).symlink_to("../victim")
        return close(writer)

    monkeypatch.setattr(CheckpointWriter, "close", plant)
    assert main(argv) == 0
    assert content(Path("out")) == expected
    assert Path("victim").read_text() == "precious"


def test_a_folder_with_files_in_the_way(tmp_path):
    (tmp_path / "target").mkdir()
    with Folder.open(tmp_path / "target") as opened:
        (tmp_path / "target" / "sub").symlink_to("..")
        with pytest.raises(ForeignFolder, match="expected a folder of our own, got: a link"):
            opened.write("sub/x", b"")
        opened.write("a/b", b"1")
        (tmp_path / "target" / "pipe").unlink(missing_ok=True)
        os.mkfifo(tmp_path / "target" / "pipe")
        with pytest.raises(ForeignFolder, match="a pipe"):
            opened.read("pipe")
        assert opened.read("nothing") is None
        assert opened.strangers({"a/b"}) == ["pipe (a pipe)", "sub (a link)"]
    assert not (tmp_path / "x").exists()


# --------------------------------------------------------------------------------------------------- finished results


@pytest.mark.parametrize("more", [[], ["--no_resume"], ["--overwrite"]])
@pytest.mark.parametrize("same", [True, False])
def test_a_finished_result_of_that_name_stays(capsys, more, same):
    main, argv = RUNS["ties"]
    assert (
        main(
            [*argv[:-1], "--save_path=out.partial"]
            if same
            else ["--method=linear", *MERGE[:-1], "--save_path=out.partial"]
        )
        == 0
    )
    (WORK / "notes.txt").write_text("gold")
    before = content(WORK)
    capsys.readouterr()
    assert main([*argv, *more]) == 1
    assert "out.partial: holds a finished result, which stays as it is" in capsys.readouterr().err
    assert content(WORK) == before
    assert not Path("out").exists()


def stop_before_the_rename(monkeypatch: pytest.MonkeyPatch, main: Main, argv: list[str]) -> None:
    rename = os.rename

    def fail(source, target, **keywords):
        if Path(target).name == "out":
            raise KeyboardInterrupt
        rename(source, target, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        assert main(argv) == 130


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "merge_recipe.json"])
def test_a_result_that_lacks_only_its_rename_is_looked_at(monkeypatch, capsys, name):
    main, argv = RUNS["no digests"]
    expected = undisturbed(main, argv)
    stop_before_the_rename(monkeypatch, main, argv)
    assert not (WORK / STATE).exists()
    raw = bytearray((WORK / name).read_bytes())
    raw[-2] ^= 1
    (WORK / name).write_bytes(raw)
    capsys.readouterr()
    assert main(argv) == 0
    assert "made again" in capsys.readouterr().err
    assert content(Path("out")) == expected
    assert sorted(path.name for path in Path().iterdir()) == ["in", "out"]


def test_a_result_that_lacks_only_its_rename_is_not_taken_by_another_command(monkeypatch, capsys):
    main, argv = RUNS["ties"]
    stop_before_the_rename(monkeypatch, main, argv)
    before = content(WORK)
    capsys.readouterr()
    assert main([*argv, "--lambda=0.5"]) == 1
    assert "holds the result of another command, which lacks only its renaming" in capsys.readouterr().err
    assert content(WORK) == before
    assert main([*argv, "--lambda=0.5", "--no_resume"]) == 0
    assert sorted(path.name for path in Path().iterdir()) == ["in", "out"]


def test_something_else_in_the_place_of_the_mark(capsys):
    main, argv = RUNS["ties"]
    Path(".out.merge-complete").write_text("notes")
    WORK.mkdir()
    (WORK / "x").touch()
    assert main(argv) == 1
    assert ".out.merge-complete: expected what a run of ours left" in capsys.readouterr().err
    assert Path(".out.merge-complete").read_text() == "notes"


# ------------------------------------------------------------------------------------------------------ users and modes


def test_nobody_else_sees_the_work_and_everybody_the_result(monkeypatch):
    main, argv = RUNS["one-run AIM"]
    modes: list[int] = []
    close = CheckpointWriter.close
    monkeypatch.setattr(
        CheckpointWriter, "close", lambda writer: (modes.append(stat.S_IMODE(WORK.stat().st_mode)), close(writer))[1]
    )
    before = os.umask(0o027)
    try:
        assert folder_module.umask() == 0o027
        assert main(argv) == 0
    finally:
        os.umask(before)
    assert set(modes) == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (Path("out"), *Path("out").iterdir())} == {0o750}
    assert {stat.S_IMODE(path.stat().st_mode) for path in Path("out").rglob("*") if path.is_file()} == {0o640}


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777, 0o702])
def test_a_work_folder_that_others_may_write_to_is_refused(monkeypatch, capsys, mode):
    main, argv, expected = cut(monkeypatch)
    WORK.chmod(mode)
    before = content(WORK)
    capsys.readouterr()
    assert main(argv) == 1
    assert f"out.partial: others may write to it (mode {mode:o})" in capsys.readouterr().err
    assert content(WORK) == before
    WORK.chmod(0o755)
    assert main(argv) == 0
    assert content(Path("out")) == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("name", ["", "model.safetensors", STATE, f"{STATE}/journal", f"{STATE}/{RUN}"])
def test_what_belongs_to_another_user_is_refused(monkeypatch, capsys, name):
    main, argv, _ = cut(monkeypatch)
    os.chown(WORK / name, 12345, 12345)
    capsys.readouterr()
    assert main(argv) == 1
    message = capsys.readouterr().err
    assert "belongs to another user" in message
    assert (name or "out.partial") in message
    assert (WORK / STATE / "journal").exists()


@pytest.mark.parametrize("what", ["modes", "users"])
def test_a_file_system_that_keeps_no_modes_or_users(monkeypatch, capsys, what):
    main, argv = RUNS["ties"]
    expected = undisturbed(main, argv)
    fstat, look = os.fstat, os.stat

    def as_told(found: os.stat_result) -> os.stat_result:
        values = list(found)
        if what == "modes":
            values[0] |= 0o777
        else:
            values[4] = 54321
        return os.stat_result(values)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", lambda descriptor: as_told(fstat(descriptor)))
        if what == "users":
            patch.setattr(
                os, "stat", lambda path, **at: as_told(look(path, **at)) if "dir_fd" in at else look(path, **at)
            )
        assert main(argv) == 0
    assert f"this file system keeps no {what}" in capsys.readouterr().err
    assert content(Path("out")) == expected


# --------------------------------------------------------------------------------------------------------------- forged

HUGE = "1" * 400
FORGED_RECORDS = [
    '{"tensors": []}',
    '{"tensors": {"a": 1}}',
    '{"tensors": null, "written": null}',
    '{"tensors": {"NAME": []}, "written": {"NAME": [["model.safetensors", []]]}}',
    '{"tensors": {"NAME": [null, null]}, "written": {"NAME": [["../victim", [0, 8, 1]]]}}',
    '{"tensors": {"NAME": [null, null]}, "written": {"NAME": [["/etc/passwd", [0, 8, 1]]]}}',
    '{"tensors": {"NAME": [[1, 2], "x"]}, "written": {"NAME": [["model.safetensors", [0, 0, 0]]]}}',
    '{"tensors": {"NAME": [[1], [NaN]]}, "written": {"NAME": [["model.safetensors", [0, 4, 0]]]}}',
    f'{{"tensors": {{"NAME": [[{HUGE}], null]}}, "written": {{"NAME": [["model.safetensors", [{HUGE}, 4, 0]]]}}}}',
    '{"tensors": {}, "written": {"NAME": [["model.safetensors", [0, 4]]]}}',
    '{"tensors": {}, "chunks": 5}',
    '{"tensors": {}, "chunks": [{"model.safetensors": {"0": "zz"}}]}',
    '{"tensors": {}, "chunks": [{"model.safetensors": {"x": "' + "0" * 64 + '"}}]}',
    '{"tensors": {}, "changed": ["a", {}]}',
    f'{{"blocks": {HUGE}}}',
    '{"blocks": [1]}',
    '{"blocks": 3, "file": "calibration-3.safetensors", "xxh3": 0}',
    '{"blocks": 3, "file": ["../victim"], "xxh3": 0}',
    '{"calibrated": true, "file": "../../victim", "xxh3": 0}',
    '{"calibrated": 1e999, "file": null, "xxh3": {}}',
]


@pytest.mark.parametrize(
    "records",
    [FORGED_RECORDS, *(pytest.param([text], marks=pytest.mark.slow) for text in FORGED_RECORDS)],
    ids=lambda records: "all" if len(records) > 1 else records[0][:40],
)
def test_forged_journals_are_not_believed(monkeypatch, capsys, records):
    main, argv, expected = cut(monkeypatch, "ties")
    with (WORK / STATE / "journal").open("ab") as journal:
        for text in records:
            journal.write(line(text.replace("NAME", "model.norm.weight").encode()))
    assert main(argv) == 0
    assert content(Path("out")) == expected
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("text", [text for text in FORGED_RECORDS if "tensors" not in text])
def test_forged_journals_of_a_calibration_are_not_believed(monkeypatch, text):
    main, argv, expected = cut(monkeypatch, "performAIM")
    (WORK / STATE / "calibration-3.safetensors").write_bytes(b"")
    with (WORK / STATE / "journal").open("ab") as journal:
        journal.write(line(text.encode()))
    assert main(argv) == 0
    assert content(Path("out")) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "1" * 5000,
        "[" * 100_000,
        '{"recipe": [1]}',
        f'{{"recipe": {{"seed": {HUGE}}}}}',
        '"\\ud800"',
        "\xff",
    ],
)
def test_forged_run_files_are_refused_in_one_message(monkeypatch, capsys, text):
    main, argv, _ = cut(monkeypatch)
    (WORK / STATE / RUN).write_bytes(text.encode("latin-1"))
    before = content(WORK)
    capsys.readouterr()
    assert main(argv) == 1
    message = capsys.readouterr().err
    assert "out.partial: holds an unfinished run that differs in" in message
    assert len(message.strip().splitlines()) == 1
    assert content(WORK) == before
    assert main([*argv, "--no_resume"]) == 0


@pytest.mark.parametrize("text", ["", "[]", '{"files": [1, null]}', '{"files": {"a": 1}}', "[" * 100_000])
def test_forged_markers_make_nothing_ours(monkeypatch, capsys, text):
    main, argv, expected = cut(monkeypatch)
    (WORK / STATE / MARKER).write_text(text)
    assert main(argv) == 0
    assert content(Path("out")) == expected


# ---------------------------------------------------------------------------------------------------------- small files


def test_a_small_file_follows_no_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "x.partial").symlink_to(victim)
    (tmp_path / "x").symlink_to(victim)
    write_text(tmp_path / "x", "new")
    assert (victim.read_text(), (tmp_path / "x").read_text(), (tmp_path / "x").is_symlink()) == (
        "precious",
        "new",
        False,
    )


def test_a_small_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    write_text(tmp_path / "x", "old")
    write = os.write

    def fail(descriptor, content):
        if len(content) > 2:
            return write(descriptor, content[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(InputError, match=r"x: cannot be written: No space left on device\. Choose another out\."):
        write_text(tmp_path / "x", "newer", name="out")
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "x"]
    assert (tmp_path / "x").read_text() == "old"


def test_a_config_on_a_full_disk_is_not_left_in_part(monkeypatch, capsys):
    flags = ["--method=linear", *MERGE[:-1], "--write_config=r.yml"]

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail)
        assert merge.main(flags) == 1
    assert "r.yml: cannot be written: No space left on device. Choose another --write_config" in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["in"]
    assert merge.main(flags) == 0


def test_a_stage_of_unnamed_files_takes_what_it_is_given(tmp_path):
    """From Python, `files` may be left out."""
    with staged(tmp_path / "o", overwrite=False) as stage:
        (stage.folder / "anything").write_text("1")
    assert (tmp_path / "o" / "anything").read_text() == "1"
