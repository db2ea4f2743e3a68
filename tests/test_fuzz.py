"""A few of the fuzzer's mutants, the same on every run, and whether it would notice what it is there to notice."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

import commands.merge as merge
from checkpoints.reader import SafetensorsFile
from checkpoints.save_path import partial_folder
from tests.fuzz import trial
from tests.fuzz.__main__ import draw_mutants, judge_each, table
from tests.fuzz.mutants import KINDS, Mutant
from tests.fuzz.trial import Place

EACH = 84
"""Mutants of each of the six kinds: 504 in all. `make fuzz` judges 4,000 of each."""
SOUND = Mutant("headers", "plain", ("one",), ("--method=ties", "--density=0.7"), (("dress_header", 1),))
BROKEN = Mutant("headers", "plain", ("one",), ("--method=linear",), (("header_length", 3),))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Where no limit of time is set: other work of the machine decides that here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "LIMIT_S", math.inf)
        yield Place(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", KINDS)
def test_mutants_are_merged_right_or_refused_in_one_message(place, kind):
    row = judge_each(place, kind, EACH)
    assert row.accepted * 10 >= row.accepted + row.refused > 0
    assert f"| {kind} | {row.accepted + row.refused} | {row.accepted} " in table({kind: row})


@pytest.mark.parametrize("kind", KINDS)
def test_every_change_changes_something_and_repeats(kind):
    traits = KINDS[kind]
    changed: set[str] = set()
    for name in (*traits.gentle, *traits.rough):
        for layout in traits.layouts:
            for seed in range(12):
                mutant = Mutant(kind, layout, ("one",), traits.methods[0], ((name, seed),))
                sound = Mutant(kind, layout, ("one",), traits.methods[0], ())
                if mutant.files() != sound.files():
                    changed.add(name)
                if seed == 0 and kind != "pickles":  # torch puts addresses and times into some of them
                    assert mutant.files() == mutant.files()
        assert Mutant(kind, traits.layouts[0], ("one",), (), ((name, 0),)).is_gentle == (name in traits.gentle)
    assert changed == {*traits.gentle, *traits.rough}


def test_the_same_seed_draws_the_same_mutants():
    assert draw_mutants("headers", 20, 1) == draw_mutants("headers", 20, 1) != draw_mutants("headers", 20, 2)


def test_what_is_sound_is_merged_and_what_is_broken_is_refused(place):
    verdict = place.judge(SOUND)
    assert (verdict.accepted, verdict.fault, verdict.error) == (True, "", "")
    verdict = place.judge(BROKEN)
    assert (verdict.accepted, verdict.fault, verdict.error) == (False, "", "Refusals")
    assert "expected a safetensors header" in verdict.message


def fault(place: Place, mutant: Mutant = SOUND) -> str:
    return place.judge(mutant).fault


def test_wrong_numbers_are_noticed(place, monkeypatch):
    read = SafetensorsFile.read
    monkeypatch.setattr(SafetensorsFile, "read", lambda *arguments: read(*arguments).flip(0))
    assert "not the rounded reference" in fault(place)


def test_a_traceback_is_noticed(place, monkeypatch):
    monkeypatch.setattr(merge, "read_recipe", lambda arguments: {}["x"])
    assert "traceback: " in fault(place)
    assert "KeyError" in fault(place)


def test_a_refusal_without_reason_is_noticed(place, monkeypatch):
    monkeypatch.setattr("checkpoints.safetensors_format.MAX_HEADER_BYTES", 1)
    assert fault(place) == "a gentle mutant was refused"


def test_an_error_that_is_not_ours_is_noticed(place, monkeypatch):
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge, "read_recipe", full)
    assert "exit code 1 by OSError" in fault(place)


def test_what_is_left_behind_is_noticed(place, monkeypatch):
    out = place.trial / "out"
    monkeypatch.setattr(trial.safetensors.torch, "load_file", lambda path: partial_folder(out).mkdir() or {})
    assert "left behind: out.partial" in fault(place)


def test_changed_inputs_are_noticed(place, monkeypatch):
    touched = [place.trial / "one" / "config.json", place.sound("plain") / "two" / "config.json"]
    content = touched[1].read_bytes()
    close = SafetensorsFile.close
    monkeypatch.setattr(
        SafetensorsFile, "close", lambda file: [path.write_bytes(b"{}") for path in touched] and close(file)
    )
    found = fault(place)
    assert "one was changed" in found
    assert f"{touched[1]} was changed" in found
    touched[1].write_bytes(content)
    place.forget()


def test_open_files_are_noticed(place, monkeypatch):
    monkeypatch.setattr(SafetensorsFile, "close", lambda file: None)
    assert "3 files left open" in fault(place)


def test_long_trials_and_large_ones_are_noticed(place, monkeypatch):
    monkeypatch.setattr(trial, "LIMIT_S", -1.0)
    monkeypatch.setattr(trial, "LIMIT_BYTES", 1 << 40)
    assert "took 0." in fault(place)
    monkeypatch.setattr(trial, "LIMIT_S", 1000.0)
    peaks = iter([0, 1 << 42])
    monkeypatch.setattr(trial, "peak_bytes", lambda: next(peaks))
    assert fault(place) == f"grew by {1 << 22} MiB"
