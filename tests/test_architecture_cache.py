"""What is remembered of an architecture: the same as what was found out, and nothing where it might not be."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import architecture, architecture_cache
from checkpoints.errors import InputError
from checkpoints.location import parse_name
from checkpoints.model import open_model
from tests.pico import make_family

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGE_AIM_CACHE", "on")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "merge_aim" / "architectures"


@pytest.fixture
def asked(monkeypatch):
    """The models whose class was built."""
    found = []
    describe = architecture.describe
    monkeypatch.setattr(
        architecture, "describe", lambda *of, label, **how: found.append(label) or describe(*of, label=label, **how)
    )
    return found


def look(folder, **options):
    model = open_model(parse_name(str(folder)), **options)
    try:
        return model.architecture
    finally:
        model.weights.close()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "mixtral", "gemma3"])
def test_it_is_what_was_found_out(tmp_path, home, asked, architecture):
    folder = make_family(tmp_path / "models", architecture, n_models=1).base
    found, remembered = look(folder), look(folder)
    assert asked == [str(folder)]
    assert remembered == found
    assert list(remembered.placements) == list(found.placements)
    assert type(remembered.buffers) is type(found.buffers) is tuple
    assert len(list(home.iterdir())) == 1


@pytest.fixture
def base(tmp_path):
    return make_family(tmp_path / "models", "llama", n_models=1).base


def edit(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_another_config_is_another_file(base, home, asked):
    look(base)
    edit(base, rope_theta=20000.0)
    look(base)
    assert len(asked) == len(list(home.iterdir())) == 2


@pytest.mark.parametrize("entry", [{"auto_map": {}}, {"configuration_files": []}])
def test_configs_that_name_other_files_are_not_remembered(base, home, asked, entry):
    edit(base, **entry)
    assert look(base) == look(base)
    assert len(asked) == 2
    assert not home.exists()


def test_trusted_code_is_not_remembered(base, home):
    look(base, trust_remote_code=True)
    assert not home.exists()


def test_refusals_are_not_remembered(base, home):
    edit(base, model_type="nothing that exists")
    for _ in range(2):
        with pytest.raises(InputError, match="expected a model_type"):
            look(base)
    assert not home.exists()


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b'{"placements": 3}', b"\xff"])
def test_a_damaged_file_is_made_again(base, home, asked, damage):
    found = look(base)
    (path,) = home.iterdir()
    path.write_bytes(damage)
    assert look(base) == found == look(base)
    assert len(asked) == 2


FORGED = {
    "a name": {"model_class": 5},
    "names": {"missing": [1]},
    "a kind": {
        "placements": {"x": {"parameter": "x", "kind": "spell", "input_dim": None, "expert": None, "others": []}}
    },
    "a dimension": {
        "placements": {"x": {"parameter": "x", "kind": "norm", "input_dim": [1], "expert": None, "others": []}}
    },
    "a placement": {"placements": {"x": [1]}},
    "a mapping": {"tied": [1]},
    "a value": {"tied": {"x": 10**400}},
    "a head": {"output_head": {}},
    "one more": {"more": 1},
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_file_is_made_again(base, home, asked, name):
    """One whose digest is right, and whose content another wrote."""
    found = look(base)
    (path,) = home.iterdir()
    text = json.dumps(json.loads(path.read_bytes().partition(b"\n")[2]) | FORGED[name]).encode()
    path.write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
    assert look(base) == found == look(base)
    assert len(asked) == 2


def test_a_changed_byte_is_found_out_again(base, home, asked):
    found = look(base)
    (path,) = home.iterdir()
    path.write_bytes(path.read_bytes().replace(b"q_proj", b"k_proj", 1))
    assert look(base) == found == look(base)
    assert len(asked) == 2


@pytest.mark.parametrize(
    "plant", [os.mkfifo, lambda path: path.symlink_to("../victim"), lambda path: os.link("victim", path)]
)
def test_what_is_no_plain_file_is_not_read(base, home, asked, plant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "victim").write_text("{}")
    found = look(base)
    (path,) = home.iterdir()
    path.unlink()
    plant(path)
    assert look(base) == found == look(base)
    assert len(asked) == 2
    assert (tmp_path / "victim").read_text() == "{}"
    assert path.is_file()
    assert not path.is_symlink()


def test_a_disk_that_takes_no_files(base, home, asked):
    home.parent.parent.write_bytes(b"a file in the way")
    assert look(base) == look(base)
    assert len(asked) == 2


def test_it_can_be_switched_off(base, home, asked, monkeypatch):
    monkeypatch.setenv("MERGE_AIM_CACHE", "off")
    assert look(base) == look(base)
    assert len(asked) == 2


def test_the_oldest_go(base, home, monkeypatch):
    monkeypatch.setattr(architecture_cache, "MOST_FILES", 2)
    for number in range(4):
        edit(base, rope_theta=float(number + 1))
        look(base)
        for age, path in enumerate(sorted(home.iterdir(), key=lambda one: one.stat().st_mtime_ns, reverse=True)):
            os.utime(path, (10**9 - age, 10**9 - age))
    assert len(list(home.iterdir())) == 2
    assert not list(home.glob(".partial-*"))


def test_a_second_merge_starts_without_transformers(tmp_path, base, home):
    program = "import sys, merge\ncode = merge.main(sys.argv[1:])\nprint(code, 'transformers' in sys.modules)\n"
    said = []
    for number in range(2):
        flags = [
            "--method=widen",
            f"--base_model={base}",
            f"--models_to_merge={base}",
            f"--save_path={tmp_path / str(number)}",
        ]
        run = subprocess.run(
            [sys.executable, "-c", program, *flags, "--quiet"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        said.append(run.stdout.splitlines()[-1])
    assert said == ["0 True", "0 False"]
