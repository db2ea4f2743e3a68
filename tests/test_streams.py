"""Closed and full streams, and Ctrl-C from the first line of a command on: one line or nothing, an exit code, no traceback."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import compare_models
from checkpoints import early
from checkpoints.screen import Screen, say

ROOT = Path(__file__).resolve().parent.parent
FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
SCORES = "method,models,aim,gsm8k,math\n,one,,10,20\n,two,,20,10\n"


def shell(line: str, folder: Path, **environment: str) -> tuple[int, str]:
    """Exit code, and what still reached anybody."""
    (folder / "s.csv").write_text(SCORES)
    command = line.replace("COMPARE", f"{sys.executable} {ROOT / 'compare_models.py'}")
    command = command.replace("MERGE", f"{sys.executable} {ROOT / 'merge.py'}")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300
    )  # fmt: skip
    return done.returncode, done.stdout.decode()


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&-", ">&- 2>&- <&-"])
def test_closed_streams_change_nothing_of_the_result(tmp_path, closed):
    code, said = shell(f"COMPARE s.csv --out t.csv {closed}", tmp_path)
    assert code == 0
    assert ("one" in said) == (">&-" not in closed.replace("2>&-", ""))
    assert (tmp_path / "t.csv").read_text().startswith("method,models")
    assert shell(f"COMPARE absent.csv {closed}", tmp_path)[0] == 1
    assert "Traceback" not in said


@FULL
@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("COMPARE s.csv > /dev/full", 1, "compare_models.py: the system: No space left on device.\n"),
        ("COMPARE s.csv > /dev/full 2>&1", 1, ""),
        ("COMPARE s.csv --quiet 2> /dev/full", 0, ""),
        ("COMPARE absent.csv 2> /dev/full", 1, ""),
        ("COMPARE --nope 2> /dev/full", 2, ""),
        ("COMPARE s.csv | true; exit ${PIPESTATUS[0]}", None, ""),
        ("COMPARE --help | true; exit ${PIPESTATUS[0]}", None, ""),
    ],
)
def test_full_and_broken_streams(tmp_path, line, code, message):
    got, said = shell(line, tmp_path)
    assert said == message
    assert got == code or (code is None and got in (0, 1))


INTERRUPT = "import os, signal\nos.kill(os.getpid(), signal.{name})\nimport time\ntime.sleep(20)\n"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("command", ["merge", "performAIM", "evaluate_model", "compare_models"])
def test_signals_while_a_command_imports(tmp_path, command, name):
    (tmp_path / "difflib.py").write_text(INTERRUPT.format(name=name))
    line = f"{sys.executable} {ROOT / command}.py --version"
    code, said = shell(line, tmp_path, PYTHONPATH=str(tmp_path))
    assert (code, said) == (130, f"{command}.py: interrupted; nothing is left behind.\n")


def test_ctrl_c_while_a_library_is_imported_that_makes_another_error_of_it(tmp_path):
    broken = "try:\n    " + INTERRUPT.format(name="SIGINT").replace("\n", "\n    ") + "pass\nexcept KeyboardInterrupt:\n    raise ImportError('half a library')\n"  # fmt: skip
    (tmp_path / "torch.py").write_text(broken)
    code, said = shell(
        "MERGE --method linear --base_model a --models_to_merge b --save_path out", tmp_path, PYTHONPATH=str(tmp_path)
    )
    assert (code, said) == (130, "merge.py: interrupted; nothing is left behind.\n")


def test_importing_the_toolkit_leaves_signals_alone():
    import signal

    assert early.name.removesuffix(".py") not in (*early.COMMANDS, *early.INSTALLED)
    assert signal.getsignal(signal.SIGINT) is not early.end_at_once


def test_what_is_printed_is_shown_and_not_obeyed(tmp_path, capsys):
    path = tmp_path / "s.csv"
    path.write_text(SCORES.replace("one", "\x1b[31mred\x07\u202e\x9b"))
    assert compare_models.main([str(path)]) == 0
    said = capsys.readouterr().out
    assert "\\x1b[31mred\\x07\\u202e\\x9b" in said.replace("\\\\", "\\").replace("\\[", "[")
    assert all(line.isprintable() for line in said.splitlines())


def test_a_screen_is_the_stream_itself_but_for_what_is_written(capsys):
    stream = io.StringIO()
    screen = Screen(stream)
    print("a\x1b\nb\r", file=screen)
    screen.writelines(["c", "\t"])
    assert screen.getvalue() == "a\\x1b\nb\\r\nc\\t"
    say("x\x1b")
    assert capsys.readouterr().err == "x\\x1b\n"
