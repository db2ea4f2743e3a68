"""The short version of benchmarks/faults.py: runs that are cut off in every way, and what they leave."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="faults.py is for Linux")
@pytest.mark.parametrize(("kills", "every"), [(6, 40), (30, 1)], ids=["some", "every write and flush"])
def test_faults_lose_nothing_and_show_nothing_incomplete(tmp_path, kills, every):
    report = tmp_path / "faults.json"
    command = [sys.executable, "benchmarks/faults.py", f"--kills={kills}", f"--every={every}", "--json", str(report)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    total = found["all"]
    assert (total["incomplete"], total["differ"], total["failed"], total["problems"]) == (0, 0, 0, [])
    assert total["faults"] >= 12
    assert total["went_on"] >= 1
    faults = {row["fault"] for row in found["rows"]}
    assert {"kill -9", "power loss", "failing write", "failing flush"} <= faults


def test_the_disk_loses_what_was_not_flushed(tmp_path):
    """The instrument itself: of a file its content at its last fsync is left, of a folder its entries at its last."""
    script = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from benchmarks.fragile_disk import Fault, FragileDisk
folder = Path({str(tmp_path / "watched")!r})
folder.mkdir()
FragileDisk(folder, Fault("power", 9)).install()
def sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
def write(name, text):
    descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT)
    os.pwrite(descriptor, text, 0)
    os.close(descriptor)
write("kept", b"flushed")      # 1
sync(folder / "kept")          # 2
write("unknown", b"no entry")  # 3
sync(folder)                   # 4: both are entries now
write("kept", b"changed")      # 5: never flushed
write("later", b"no entry")    # 6
sync(folder / "later")         # 7: content without an entry
os.rename(folder / "kept", folder / "moved")  # 8: not flushed
write("moved", b"x")           # 9
write("moved", b"y")           # 10: the power fails before it
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, timeout=60)
    assert done.returncode == 137
    left = {path.name: path.read_bytes() for path in (tmp_path / "watched.after").iterdir()}
    assert left == {"kept": b"flushed", "unknown": b""}
