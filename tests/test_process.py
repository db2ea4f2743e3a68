"""What changes the whole process is switched on by commands alone; and a plain merge loads no more than it needs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import code_size
from checkpoints import process

MOST_MODULES = 91
"""A new module that every merge loads has to be worth it."""
ROOT = Path(__file__).resolve().parent.parent
INPUTS = ROOT / "tests" / "goldens" / "inputs"

# Merges from Python or by the command, and notes each change of the process on the way, and what is different afterwards.
SPY = """
import gc, json, os, resource, signal, sys, threading
how, out = sys.argv[1:]
import torch, transformers
from checkpoints import process
changes = []

def watch(module, name):
    real = getattr(module, name)
    def note(*arguments, **keywords):
        changes.append(name)
        return real(*arguments, **keywords)
    setattr(module, name, note)

for module, name in ((sys, "setswitchinterval"), (resource, "setrlimit"), (gc, "disable"), (gc, "freeze"), (signal, "signal")):
    watch(module, name)
process.ctypes = type("ctypes", (), {"CDLL": lambda name: type("libc", (), {"mallopt": lambda *_: changes.append("mallopt")})})

class Modules(dict):
    def __setitem__(self, name, module):
        if module is None:
            changes.append(f"no {name}")
        super().__setitem__(name, module)

process.sys = type("sys", (), {**{k: getattr(sys, k) for k in ("getswitchinterval", "setswitchinterval", "exit")}, "modules": Modules(sys.modules)})
def state():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start(); thread.join()
    return [sys.getswitchinterval(), resource.getrlimit(resource.RLIMIT_AS), gc.isenabled(), gc.get_freeze_count(), torch.get_num_threads(), seen,
            [str(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)], sorted(name for name, m in sys.modules.items() if m is None)]
before = state()
base, models = "INPUTS/base", "INPUTS/math,INPUTS/code"
if how == "python":
    from merging import make_recipe, merge
    merge(make_recipe("widen", base, models), out)
else:
    import merge
    assert merge.main(["--method=widen", "--base_model=" + base, "--models_to_merge=" + models, "--save_path=" + out, "--quiet"]) == 0
print(json.dumps({"changes": sorted(set(changes)), "same": before == state(), "before": str(before), "after": str(state())}))
"""


def spy(how: str, folder: Path) -> dict:
    """Which changes of the process a merge makes, and whether all is as before afterwards."""
    script = SPY.replace("INPUTS", str(INPUTS))
    argv = [sys.executable, "-c", script, how, str(folder / how)]
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / f"cache_{how}")}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    found: dict = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_call_from_python_changes_nothing_in_the_process(tmp_path: Path):
    found = spy("python", tmp_path)
    assert found["changes"] == []
    assert found["same"], found


def test_a_command_changes_its_own_process(tmp_path: Path):
    """The spy sees what there is to see."""
    found = spy("command", tmp_path)
    assert {"mallopt", "disable", "setrlimit", "signal", "no sklearn"} <= set(found["changes"])


def test_each_effect_is_off_outside_a_command(monkeypatch: pytest.MonkeyPatch):
    interval = sys.getswitchinterval()
    with process.short_turns(), process.without("no_such_module"), process.limited_memory(1), process.quick_start():
        assert sys.getswitchinterval() == interval
        assert "no_such_module" not in sys.modules
    with process.own_process():
        assert process.is_ours()
        with process.short_turns(), process.without("no_such_module"):
            assert sys.getswitchinterval() == pytest.approx(process.SWITCH_S)
            assert sys.modules["no_such_module"] is None  # type: ignore[comparison-overlap]
    assert not process.is_ours()
    assert "no_such_module" not in sys.modules
    assert sys.getswitchinterval() == interval


def test_no_other_file_changes_the_process():
    """Programs under evaluation run in processes of their own, whose limits the sandbox sets."""
    effect = re.compile(
        r"setrlimit|mallopt|setswitchinterval|gc\.(disable|freeze)|signal\.signal\(|sys\.modules\[.*\] ="
    )
    apart = ("evaluation/jail/", "evaluation/grading/worker.py", "checkpoints/process.py")
    apart += (
        "checkpoints/early.py",
        "checkpoints/strangers_program.py",
    )  # a command's first import; a process of its own
    paths = [path for package in code_size.packages() for path in sorted((ROOT / package).rglob("*.py"))]
    names = [path.relative_to(ROOT).as_posix() for path in paths if effect.search(path.read_text())]
    assert "checkpoints/process.py" in names
    assert [name for name in names if not name.startswith(apart)] == []


# ------------------------------------------------------------------------------------------------------- what is loaded


@pytest.fixture(scope="module")
def plain() -> code_size.Size:
    return code_size.measure()


def test_a_plain_merge_loads_nothing_of_aim(plain: code_size.Size):
    assert not [name for name in plain.modules if name.split(".")[0] in ("aim", "evaluation", "reports")]


def test_a_plain_merge_loads_few_modules(plain: code_size.Size):
    assert len(plain.modules) <= MOST_MODULES, plain.modules


@pytest.mark.slow
def test_the_count_sees_aim(tmp_path: Path):
    calibration = [f"--calibration_data={INPUTS / 'calib.jsonl.gz'}", "--n_samples=4", "--block_size=64"]
    found = code_size.measure(ROOT, "--omega=0.4", *calibration)
    assert "aim.step" in found.modules
