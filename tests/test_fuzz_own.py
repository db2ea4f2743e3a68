"""A few of the fuzzer's mutants of our own files, the same on every run, and whether it would notice what it is there to notice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import commands.compare_models as command
from tests.fuzz.__main__ import judge_each
from tests.fuzz.own_files import HOW, OWN_KINDS, OwnMutant, OwnPlace, fault

EACH = 24
"""Mutants of each kind; `make fuzz` judges 20,000 of all."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnPlace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.fuzz.own_files.LIMIT_S", float("inf"))
        yield OwnPlace(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", OWN_KINDS)
def test_mutants_are_read_as_before_or_refused_in_one_message(place, kind):
    row = judge_each(place, kind, EACH)
    assert row.accepted
    assert row.refused or kind == "cache"


def test_every_way_changes_something_and_repeats():
    content = b'{"a": [1, 2, {"b": "c"}], "d": null}\n'
    for how in HOW:
        changed = [OwnMutant("results", 0, ((how, seed),)).of(content) for seed in range(9)]
        assert changed == [OwnMutant("results", 0, ((how, seed),)).of(content) for seed in range(9)]
        assert set(changed) != {content}


def test_what_the_judge_notices(place, monkeypatch):
    sound = OwnMutant("scores", 0, ())
    kept: list[object] = []
    assert place.judge(sound).fault == ""
    for body, found in (
        (lambda arguments: {}["x"], "traceback: "),
        (lambda arguments: print("odd", file=__import__("sys").stderr), "said: odd"),
        (lambda arguments: (_ for _ in ()).throw(OSError(28, "full")), "a sound file was refused"),
        (lambda arguments: kept.append(open("s.csv")), "1 files left open"),  # noqa: SIM115
    ):
        monkeypatch.setattr(command, "run", body)
        assert found in place.judge(sound).fault
    assert fault(1, "compare_models.py: x\x1b.\n") == "message: 'compare_models.py: x\\x1b.\\n'"
    assert fault(1, "odd\n") == "no message: 'odd\\n'"
    assert fault(3, "") == "exit code 3: "


def test_another_result_is_noticed(place, monkeypatch):
    sound = OwnMutant("cache", 0, ())
    assert place.judge(sound).fault == ""
    monkeypatch.setattr("tests.fuzz.own_files.weights", lambda *arguments: {})
    assert place.judge(sound).fault == "another result"
