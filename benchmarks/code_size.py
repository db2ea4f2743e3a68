"""How much code a plain merge runs, and how many functions take many arguments.

    python -m benchmarks.code_size                 # of this checkout
    python -m benchmarks.code_size ../other        # of another checkout, such as `git worktree add ../other COMMIT`

Counts, in a process of its own, what `merge.py --method ties` of three tiny models runs: modules of ours that are loaded,
functions of ours that are called, and lines of ours that are executed, in all threads. Then, by reading the source, functions
with more than six arguments.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INPUTS = ROOT / "tests" / "goldens" / "inputs"
NOT_OURS = {"tests", "examples", "benchmarks"}
"""Packages that no command loads."""
MANY = 6

# Runs a command under a tracer that looks at our own files only, and prints what it saw. It must not import anything of ours.
PROBE = """
import json, os, runpy, sys, threading
out, root, command, *flags = sys.argv[1:]
os.chdir(root)
sys.path.insert(0, root)
functions, lines = set(), set()
ours = {}

def is_ours(path):
    if path not in ours:
        inside = os.path.isabs(path) or os.path.exists(path)  # torch's own made-up modules name files that are nowhere
        ours[path] = inside and os.path.realpath(path).startswith(root + os.sep) and ".venv" not in path
    return ours[path]

def each_line(frame, event, argument):
    if event == "line":
        lines.add((frame.f_code.co_filename, frame.f_lineno))
    return each_line

def each_call(frame, event, argument):
    code = frame.f_code
    if not is_ours(code.co_filename):
        return None
    if code.co_name != "<module>" and code.co_flags & 2:  # 2: has locals of its own, so is no class body
        functions.add((code.co_filename, code.co_qualname))
    return each_line

sys.argv = [command, *flags]
threading.settrace(each_call)
sys.settrace(each_call)
code = 0
try:
    runpy.run_path(command, run_name="__main__")
except SystemExit as end:
    code = end.code or 0
sys.settrace(None)
modules = sorted(name for name, module in list(sys.modules.items()) if name not in ("__main__", "__mp_main__") and is_ours(getattr(module, "__file__", None) or ""))
found = {"code": code, "modules": modules, "functions": len(functions), "files": len({path for path, _ in lines}), "lines": len(lines)}
with open(out, "w") as file:
    json.dump(found, file)
"""


@dataclass(frozen=True)
class Size:
    """What a plain merge runs.

    Attributes:
        modules: of ours that are loaded, by name.
        functions: of ours that are called, and files that they, or the modules, are in.
        lines: that are executed.
    """

    modules: list[str]
    functions: int
    files: int
    lines: int


def measure(checkout: Path = ROOT, *flags: str) -> Size:
    """Run a plain merge of one checkout of the repository. Raises RuntimeError where it fails.

    Args:
        flags: more of merge.py.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        models = f"{INPUTS / 'math'},{INPUTS / 'code'}"
        command = ["merge.py", "--method=ties", f"--base_model={INPUTS / 'base'}", f"--models_to_merge={models}"]
        command += [f"--save_path={folder}/merged", "--quiet", *flags]
        # What is remembered of architectures lies in the cache: from a run before, as on any user's machine.
        environment = {**os.environ, "XDG_CACHE_HOME": folder, "HF_HUB_OFFLINE": "1"}
        environment.pop("MERGE_AIM_CACHE", None)
        for run in ("first", "second"):
            argv = [sys.executable, "-c", PROBE, str(out), str(checkout.resolve()), *command]
            argv = [part.replace("/merged", f"/{run}") for part in argv]
            done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
            found = json.loads(out.read_text()) if out.exists() else {"code": done.returncode}
            if found.pop("code") != 0:
                raise RuntimeError(f"{checkout}: the merge failed: {done.stderr[-2000:]}")
    return Size(**found)


def packages(checkout: Path = ROOT) -> list[str]:
    """The packages of a checkout that commands load."""
    found = (file.parent.name for file in checkout.glob("*/__init__.py"))
    return sorted(name for name in found if name not in NOT_OURS)


def with_many_arguments(checkout: Path = ROOT, more_than: int = MANY) -> Iterator[tuple[str, int]]:
    """(`package/file.py:function`, how many arguments) of each function with more than so many, `self` and `cls` excepted."""
    paths = [path for package in packages(checkout) for path in sorted((checkout / package).rglob("*.py"))]
    for path in [*paths, *sorted(checkout.glob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                every = node.args
                names = [one.arg for one in (*every.posonlyargs, *every.args, *every.kwonlyargs)]
                count = len([name for name in names if name not in ("self", "cls")])
                if count > more_than:
                    yield f"{path.relative_to(checkout).as_posix()}:{node.name}", count


def main(argv: Sequence[str] | None = None) -> int:
    """Print the counts; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", nargs="?", type=Path, default=ROOT, help="default: this one")
    parser.add_argument("--json", action="store_true", help="print as JSON, with the names")
    arguments = parser.parse_args(argv)
    size, many = measure(arguments.checkout), dict(with_many_arguments(arguments.checkout))
    if arguments.json:
        print(json.dumps({**asdict(size), "more_than_six_arguments": many}, indent=1))
        return 0
    of_aim = sum(name.split(".")[0] == "aim" for name in size.modules)
    print(f"modules of ours loaded: {len(size.modules)}, of aim: {of_aim}")
    print(f"functions called: {size.functions} in {size.files} files; lines executed: {size.lines}")
    print(f"functions with more than six arguments: {len(many)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
