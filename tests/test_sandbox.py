"""The sandbox: right verdicts, and hostile programs that do not get out, do not pass, and do not disturb the next one.

A hostile program runs only in a jail that a harmless trial has just proved (`Sandbox` refuses otherwise), never as
root, and aimed at marker files, listeners and a process of the test's own (tests/hostile_world.py). That the attacks
are real is shown in an outer jail: there each works without the layers that stop it, and each such layer stops it
alone. Where bubblewrap works, a level that does not is a failure; elsewhere it is skipped. The summary counts both.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import secrets
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoints.errors import InputError
from evaluation import sandbox as sandbox_module
from evaluation.jail import landlock, room, seccomp, view
from evaluation.jail.host import Jail, JailError, Outcome
from evaluation.jail.settings import LIMITS, NAMESPACES, Settings
from evaluation.jail.zygote import remove_tree
from evaluation.sandbox import LOCKED, Level, Program, Sandbox, Verdict, probe, why_not
from tests import hostile_control
from tests.hostile_programs import ALL, COIN_TOSS, CONTROLLED, LOOP_S, MEMORY_BYTES, TOOLS, UNSOLVED
from tests.hostile_world import World, process_name, processes_named

ROOT = Path(__file__).resolve().parent.parent
ROOMS = (Level.BUBBLEWRAP, Level.USERNS_LANDLOCK)
BOOT_CONTROL = (
    "import sys; sys.path.append(sys.argv.pop(1)); from tests.hostile_control import main; main(sys.argv[1:])"
)
CONTROL_S = 150.0
BROKEN_IN_ONE_INTERPRETER = ("empty the builtins", "trace the test", "hide the test's assertions")
pytestmark = pytest.mark.filterwarnings("ignore:sandbox.*:UserWarning")

# Level or control -> hostile programs run. What does not run is skipped as a whole.
RAN: dict[str, int] = {}


def count(what: str, programs: int = 1) -> None:
    RAN[what] = RAN.get(what, 0) + programs


def summary() -> list[str]:
    """For tests/conftest.py: the level that evaluations use here, how many programs ran under each, what is skipped."""
    if not problem.cache_info().currsize:
        return []
    best = next((level.value for level in LOCKED if problem(level) is None), "none, nothing can lock programs up here")
    rows = [f"sandbox level: {best}"]
    rows += [f"  {what}: {ran} hostile programs run, 0 skipped" for what, ran in RAN.items()]
    rows += [f"  {v.value}: 0 hostile programs run, {len(ALL)} skipped: {problem(v)}" for v in LOCKED if problem(v)]
    if all(problem(level) for level in ROOMS):
        rows.append(f"  control in an outer jail: 0 hostile programs run, {len(CONTROLLED)} skipped: no outer jail")
    return rows


@functools.cache
def problem(level: Level) -> str | None:
    return why_not(level)


def need(level: Level) -> None:
    """Skip where a level does not work; fail where bubblewrap does, and the kernel has what the level needs."""
    found = problem(level)
    if found is None:
        return
    if problem(Level.BUBBLEWRAP) is None and landlock.abi():
        pytest.fail(f"bubblewrap works here, but {level.value} does not: {found}")
    pytest.skip(f"{level.value}: {found}")


@pytest.fixture(scope="module", params=LOCKED, ids=lambda level: level.value)
def level(request: pytest.FixtureRequest) -> Level:
    need(request.param)
    return request.param


@pytest.fixture(scope="module")
def sandbox(level: Level) -> Iterator[Sandbox]:
    with Sandbox(level, workers=2) as opened:
        yield opened


@pytest.fixture(scope="module")
def lone_sandbox(level: Level) -> Iterator[Sandbox]:
    """One worker, so that the next program runs where the last one ran."""
    with Sandbox(level, workers=1, memory_bytes=MEMORY_BYTES) as opened:
        yield opened


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as targets:
        yield targets


@contextlib.contextmanager
def borrowed(sandbox: Sandbox) -> Iterator[Jail]:
    """The jail of a sandbox with one worker that has run something."""
    jail = sandbox.idle.get()
    assert jail is not None
    yield jail
    sandbox.idle.put(jail)


def verdict(sandbox: Sandbox, source: str, test: str = "", timeout_s: float = 10.0) -> Verdict:
    return sandbox.run([Program(source, test, timeout_s)])[0]


# ------------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("source", "test", "status", "detail"),
    [
        ("def f(x): return x + 1", "assert f(1) == 2", "passed", ""),
        ("", "", "passed", ""),
        ("x = 1", "assert x == 1 and __name__ != '__main__'", "passed", ""),
        ("def f(x): return x", "assert f(1) == 2, 'f(1)'", "failed", "AssertionError: f(1)"),
        ("def f(:", "", "failed", "SyntaxError: invalid syntax (<program>, line 1)"),
        ("def f(): pass", "def", "failed", "SyntaxError: invalid syntax (<test>, line 1)"),
        ("raise SystemExit(0)", "", "failed", "SystemExit: 0"),
        ("import os\nos._exit(0)", "", "failed", "ended with status 0 before its tests did"),
        ("import os\nos._exit(3)", "", "failed", "ended with status 3 before its tests did"),
        ("import not_there", "", "failed", "ModuleNotFoundError: No module named 'not_there'"),
        ("import torch", "", "failed", "ModuleNotFoundError: No module named 'torch'"),
        ("raise ValueError('a\\x00\\nb\\u00e9')", "", "failed", "ValueError: a  bé"),
        ("import ctypes\nctypes.string_at(0)", "", "failed", "killed by signal 11"),
    ],
)
def test_verdicts(sandbox, source, test, status, detail):
    found = verdict(sandbox, source, test)
    assert (found.status, found.detail) == (status, detail)


MAKES_POINTS = """
import collections, decimal, fractions, numpy
class Point:
    def __init__(self, x): self.x = x
    def __len__(self): return 3
    def __getitem__(self, key): return key * 2
    def __str__(self): return f"<{self.x}>"
    def double(self, by=2): return Point(self.x * by)
class Unhappy(ValueError): pass
def total(points): return sum(point.x for point in points)
def count(n):
    yield from range(n)
def numbers(): return [numpy.int64(1), numpy.float64(0.5), fractions.Fraction(1, 3), decimal.Decimal("0.1"), 10**5000, 1j]
def sort(items):
    items.sort()
    items[0].append(9)
def fail(what): raise {"mine": Unhappy, "key": KeyError, "more": UnicodeDecodeError}[what]("no")
def counted(text): return collections.Counter(text)
def keys(): return {1: 2}.keys()
def itself(x): return x
limit = 7
"""
WHAT_TESTS_CAN = {
    "objects": "p = Point(3)\np.x = 4\nassert p.double().x == 8 and p.double(by=3).x == 12 and total([p, Point(1)]) == 5",
    "their parts": "p = Point(3)\nassert len(p) == 3 and p[4] == 8 and str(p) == '<3>' and p and repr(p) == '<Point of the program>'",
    "identity": "p = Point(3)\nassert itself(p) is p and itself(p) == p and Point(3) != Point(3) and p in [1, p]",
    "generators": "assert list(count(3)) == [0, 1, 2] and next(count(3)) == 0 and 2 in count(3) and sum(count(5)) == 10",
    "numbers": "from fractions import Fraction\nfrom decimal import Decimal\na, b, c, d, e, f = numbers()\n"
    "assert [type(n) for n in (a, b, c, d, e, f)] == [int, float, Fraction, Decimal, int, complex]\n"
    "assert (a, b, c, d, e, f) == (1, 0.5, Fraction(1, 3), Decimal('0.1'), 10**5000, 1j)",
    "changes in place": "inner = [1]\nl = [[3], inner]\nassert sort(l) is None and l == [[1, 9], [3]]",
    "exceptions": "for what, kind in (('mine', ValueError), ('key', KeyError)):\n"
    "    try: fail(what)\n    except kind as error: assert 'no' in str(error)\n    else: assert False",
    "subclasses": "assert counted('aab') == {'a': 2, 'b': 1} and type(counted('')) is dict",
    "views as lists": "assert list(keys()) == [1] and keys() != {1}",
    "globals": "assert limit == 7 and itself(float('inf')) > 1 and itself((1, [2], {3: {4}})) == (1, [2], {3: {4}})",
    "arguments by name": "assert itself(x=[None, True, 'a', b'b', range(3)]) == [None, True, 'a', b'b', range(3)]",
    "names of its own": "def check(candidate):\n    assert candidate(1) == 1 and sorted([2, 1]) == [1, 2]\ncheck(itself)",
}


@pytest.mark.parametrize("name", WHAT_TESTS_CAN)
def test_what_tests_can_do_with_a_program(lone_sandbox, name):
    found = verdict(lone_sandbox, MAKES_POINTS, WHAT_TESTS_CAN[name])
    assert found.status == "passed", found.detail


@pytest.mark.parametrize(
    ("test", "detail"),
    [
        ("itself(len)", "TypeError: a builtin_function_or_method cannot be handed to the program"),
        ("isinstance(Point(1), Point)", "TypeError: isinstance() arg 2 must be a type, a tuple of types, or a union"),
        ("Point(1) + 1", "TypeError: unsupported operand type(s) for +: 'Remote' and 'int'"),
        ("fail('mine')", "Unhappy: no"),
        ("itself('x' * (9 << 20))", "the channel: expected at most 8388608 bytes, got 9437254"),
        ("other(1)", "NameError: name 'other' is not defined"),
    ],
)
def test_what_tests_cannot_do(lone_sandbox, test, detail):
    found = verdict(lone_sandbox, MAKES_POINTS, test)
    assert found.status == "failed"
    assert found.detail.startswith(detail[:40]), found.detail


def test_a_test_takes_only_the_names_that_it_asks_for(lone_sandbox):
    program = Program(
        "def sum(a): return 7\ndef abs(a): return 7", "assert sum([1, 1]) == 7 and abs(-1) == 1", names=("sum",)
    )
    assert lone_sandbox.run([program])[0].status == "passed"


WHAT_PROGRAMS_NEED = {
    "numpy": "import numpy as np\nassert np.arange(6).reshape(2, 3).sum() == 15\n"
    "assert np.linalg.inv(np.eye(3))[0, 0] == 1",
    "random numbers": "import numpy, random, secrets, uuid\n"
    "random.seed(1); random.random(); secrets.token_hex(); uuid.uuid4()",
    "the standard library": "import asyncio, csv, ctypes, dataclasses, difflib, email, encodings.idna, sqlite3, "
    "statistics, unittest, xml.dom.minidom, zoneinfo\n'ä'.encode('idna'); 'x'.encode('utf-16').decode('utf-16')",
    "asyncio": "import asyncio\nasync def f(): return 3\nassert asyncio.run(f()) == 3",
    "threads": "from concurrent.futures import ThreadPoolExecutor\n"
    "assert list(ThreadPoolExecutor(8).map(abs, range(-99, 0))) == list(range(99, 0, -1))",
    "files of its own": "import os, tempfile, shutil\nopen('a', 'w').write('x')\nos.mkdir('d')\nos.rename('a', 'd/a')\n"
    "with tempfile.TemporaryDirectory() as t: open(t + '/b', 'w').write('y')\n"
    "shutil.rmtree('d')\nassert not os.listdir('.')",
    "dataclasses": "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    "@dataclass\nclass A:\n    x: int\nA(1)",
    "pickle": "import pickle\nclass A: pass\nassert type(pickle.loads(pickle.dumps(A()))) is A",
    "its own exit": "try: exit()\nexcept SystemExit: pass",
    "signals to itself": "import signal\nsignal.signal(signal.SIGALRM, lambda *a: 1 / 0)\n"
    "try:\n    signal.setitimer(0, 0.01)\n    while True: pass\nexcept ZeroDivisionError: pass",
    "recursion": "f = lambda n: n and f(n - 1)\nassert f(900) == 0",
    "time": "import time, datetime\ntime.sleep(0.01); datetime.datetime.now().astimezone()",
    "its output": "import sys\nprint('x' * 10**6)\nprint('y', file=sys.stderr)\nsys.stdout.flush()",
}


@pytest.mark.parametrize("name", WHAT_PROGRAMS_NEED)
def test_programs_have_what_they_need(sandbox, name):
    found = verdict(sandbox, WHAT_PROGRAMS_NEED[name])
    assert found.status == "passed", found.detail


def test_program_is_nobody_with_nothing(sandbox):
    source = """
import ctypes, os, resource, sys
assert ctypes.CDLL(None).prctl(3, 0, 0, 0, 0) == 0, "can be dumped"
assert ctypes.CDLL(None).prctl(39, 0, 0, 0, 0) == 1, "can gain privileges"
assert resource.getrlimit(resource.RLIMIT_AS) == (2**30, 2**30) and resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
assert os.getresuid() == (65534,) * 3 and os.getresgid() == (65534,) * 3 and os.getgroups() in ([], [65534])
assert not os.environ and sys.argv == ["program"] and not os.listdir(".") and sys.stdin.read() == ""
assert not any("site-packages" in path for path in sys.path), sys.path
for descriptor in range(3, 64):
    try:
        os.fstat(descriptor)
    except OSError:
        continue
    assert descriptor == 3 or descriptor >= 16, descriptor  # the channel; folders that only root can get to
"""
    if os.getuid() != 0 and sandbox.level is Level.LANDLOCK:
        source = source.replace("65534", str(os.getuid()))  # who is nobody special cannot become nobody
    found = verdict(sandbox, source)
    assert found.status == "passed", found.detail


def test_order_and_progress(sandbox):
    programs = [Program(f"x = {i}", f"assert {i} % 3") for i in range(30)]
    seen: list[tuple[int, int]] = []
    found = sandbox.run(programs, progress=lambda done, total: seen.append((done, total)))
    assert [v.status for v in found] == ["passed" if i % 3 else "failed" for i in range(30)]
    assert seen == [(i + 1, 30) for i in range(30)]
    assert sandbox.run([]) == []


def test_programs_run_at_the_same_time(sandbox):
    started = time.monotonic()
    found = sandbox.run([Program("import time\ntime.sleep(0.5)\nassert False", "", 10.0)] * 2)
    assert [v.status for v in found] == ["failed"] * 2
    assert time.monotonic() - started < sum(v.seconds for v in found)


def test_time_limit_holds(sandbox):
    started = time.monotonic()
    found = verdict(sandbox, "while True: pass", timeout_s=0.3)
    assert (found.status, found.detail) == ("timeout", "time limit")
    assert found.seconds >= 0.3
    assert time.monotonic() - started >= 0.6  # once more, alone


def test_time_kept_waiting_does_not_count_the_second_time(sandbox):
    """As on a busy machine: past its time on the clock, but not in processor time."""
    found = verdict(sandbox, "import time\ntime.sleep(0.4)", timeout_s=0.2)
    assert found.status == "passed"
    assert found.seconds >= 0.4
    found = verdict(
        sandbox,
        "import time\nstart = time.process_time()\nwhile time.process_time() < start + 0.6: pass",
        timeout_s=0.2,
    )
    assert found.status == "timeout"


def test_nothing_of_a_run_reaches_the_next(sandbox):
    source = "import math, random, sys, os\nmath.pi = 3\nsys.path.clear()\nos.environ['A'] = 'b'\nrandom.seed(0)\n"
    source += "open('left', 'w')"
    check = "import math, sys, os\nassert math.pi > 3.1 and sys.path and not os.environ and not os.listdir('.')"
    found = sandbox.run([Program(source, "", 10.0), Program(check, "", 10.0)] * 8)
    assert {v.status for v in found} == {"passed"}, found


@pytest.mark.parametrize(
    ("leave", "look"),
    [
        (
            "for d in (0, 1, 2): fcntl.fcntl(d, fcntl.F_SETFL, os.O_APPEND | os.O_NONBLOCK)",
            "for d in (0, 1, 2): assert not fcntl.fcntl(d, fcntl.F_GETFL) & (os.O_APPEND | os.O_NONBLOCK)",
        ),
        ("fcntl.flock(0, fcntl.LOCK_EX)", "fcntl.flock(os.open(os.devnull, os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)"),
    ],
    ids=["flags", "lock"],
)
def test_nothing_of_a_run_stays_on_its_descriptors(lone_sandbox, leave, look):
    verdict(lone_sandbox, "import fcntl, os\n" + leave)
    found = verdict(lone_sandbox, "import fcntl, os\n" + look)
    assert found.status == "passed", found
    with open(os.devnull, "r+b", buffering=0) as outside:
        fcntl.flock(outside, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_random_numbers_differ_between_runs(sandbox):
    found = sandbox.run([Program("import random\nraise Exception(random.random())", "", 10.0)] * 4)
    assert len({v.detail for v in found}) == 4


# ------------------------------------------------------------------------------------------------ hostile programs


NEXT = Program(
    "import os\ndef solve(): return 42",
    "assert solve() == 42 and not os.listdir('.') and len(os.listdir('/usr')) > 3",
    10.0,
)


@pytest.mark.parametrize("program", ALL, ids=lambda program: program.name)
def test_hostile_programs_are_held(level, lone_sandbox, world, program):
    count(level.value)
    world.renew()
    source = world.constants() + program.source
    found, following = lone_sandbox.run([Program(source, program.test, program.timeout_s), NEXT])
    effects = world.effects(found.detail)
    if level not in program.open_at:
        assert not effects, (effects, found)
    assert found.status in ("failed", "timeout", "forged"), found
    assert following.status == "passed", following


@pytest.mark.parametrize("outer", ROOMS, ids=lambda level: level.value)
def test_a_room_holds_alone(outer, world, open_folder):
    """Without Landlock and without the filter: what is not in the room cannot be reached from it."""
    need(outer)
    layers = (NAMESPACES, LIMITS)
    scratch = str(open_folder)
    if outer is Level.BUBBLEWRAP:
        start, settings = view.bubblewrap(shutil.which("bwrap") or "", layers, MEMORY_BYTES)
        jail = Jail(view.python(), settings, start)
    else:
        jail = Jail(view.python(), view.own_room(scratch, layers, MEMORY_BYTES))
    problems = []
    try:
        for program in [p for p in ALL if p.effect and p.room]:
            count(f"room of {outer.value} alone")
            world.renew()
            outcome = jail.attempt(world.constants() + program.source, program.test, program.timeout_s)
            effects = world.effects(outcome.detail)
            if effects or outcome.passed:
                problems.append((program.name, effects, outcome))
            assert jail.attempt(NEXT.source, NEXT.test, NEXT.timeout_s).passed, program.name
    finally:
        jail.close()
    assert not problems


def control_command(folder: Path) -> list[str]:
    """The command that runs tests/hostile_control.py in an outer jail, made by whatever works here."""
    here = json.dumps(hostile_control.outer_namespaces())
    command = [view.python(), "-I", "-S", "-B", "-c", BOOT_CONTROL, str(ROOT), here]
    binds, links, _ = view.shown_in_room()
    binds = (*binds, (str(ROOT), str(ROOT)))
    if problem(Level.BUBBLEWRAP) is None:
        start = room.bubblewrap(shutil.which("bwrap") or "", binds, links)
        size = str(hostile_control.SCRATCH_BYTES)
        before = start.index("--remount-ro")
        start[before:before] = ["--perms", "1777", "--size", size, "--tmpfs", hostile_control.SCRATCH, "--as-pid-1"]
        return [*start, *command]
    for name in ("root", "scratch"):
        (folder / name).mkdir()
    binds = (*binds, (str(folder / "scratch"), hostile_control.SCRATCH))
    settings = Settings((), 0, "", root=str(folder / "root"), binds=binds, links=links)
    return [*command, settings.to_json()]


@pytest.fixture(scope="module")
def controls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What each attack did without the layers that stop it, and with each of them alone."""
    if problem(Level.BUBBLEWRAP) is not None:
        need(Level.USERNS_LANDLOCK)
    command = control_command(tmp_path_factory.mktemp("control"))
    done = subprocess.run(command, env={}, cwd="/", capture_output=True, text=True, timeout=CONTROL_S, check=False)
    assert done.returncode == 0, done.stderr
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("program", CONTROLLED, ids=lambda program: program.name)
def test_control_attack_works_without_its_layers(controls, program):
    count("control in an outer jail")
    row = controls[program.name]
    assert program.effect in row["without"], row
    for layer, effects in row["with"].items():
        assert program.effect not in effects, (layer, row)
        assert "jail" not in effects, (layer, row)


def test_every_attack_with_a_target_has_a_control():
    assert len({program.name for program in ALL}) == len(ALL)
    for program in ALL:
        assert not program.effect or bool(program.held_by) != bool(program.uncontrolled) or program.open_at, (
            program.name
        )


@pytest.mark.parametrize("name", [program.name for program in TOOLS])
def test_control_tools_are_replaced_in_one_interpreter(lone_sandbox, world, name):
    """Where program and test share an interpreter, these pass, but for three that break something else, too."""
    program = next(program for program in TOOLS if program.name == name)
    joined = "exec(compile(SOURCE, '', 'exec'))\nexec(compile(TEST, '', 'exec'))"
    source = f"SOURCE = {world.constants() + program.source!r}\nTEST = {program.test!r}\n{joined}"
    found = verdict(lone_sandbox, source)
    if name not in BROKEN_IN_ONE_INTERPRETER:
        assert found.status == "passed", found


def test_no_coin_toss_passes(sandbox):
    """A wrong program that cheats at random, and so could have cheated in the right run of several."""
    cheat = COIN_TOSS.replace("return 42", "return 41")
    found = sandbox.run([Program("import os, sys\n" + cheat, UNSOLVED, 10.0)] * 40)
    assert {v.status for v in found} == {"failed"}, found


def test_control_exit_status_would_be_fooled(sandbox):
    """The other way round: these end with status 0, which is what a checker without a token would see."""
    for source in ("import os\nos._exit(0)", "import os\nprint('passed')\nos._exit(0)"):
        assert verdict(sandbox, source, UNSOLVED).detail == "ended with status 0 before its tests did"


def test_what_stays_open(sandbox):
    """Known and documented; a change here is good news."""
    forgetful = "def solve(x):\n    x.clear()\n    return []"
    assert verdict(sandbox, forgetful, "x = [3, 1]\nassert solve(x) == sorted(x)").status == "passed"
    reciting = "def solve(x): return {1: 42}.get(x)"
    assert verdict(sandbox, reciting, "assert solve(1) == 42").status == "passed"


def test_draws(monkeypatch):
    """The impossible test twice and the real one, in any order, until one decides."""
    orders = set()

    class Fake:
        def __init__(self, passes, holds):
            self.passes, self.holds, self.seen = passes, holds, []

        def attempt(self, *_, impossible, **__):
            self.seen.append(impossible)
            passed = self.passes(impossible)
            return Outcome(passed, impossible and self.holds and not passed, False, "x", 0.1)

    def judged(passes, holds=True):
        jail = Fake(passes, holds)
        found = sandbox_module.judge(jail, Program("", ""))
        return found.status, jail.seen

    for _ in range(100):
        status, seen = judged(lambda impossible: not impossible)
        assert (status, sorted(seen)) == ("passed", [False, True, True])
        orders.add(tuple(seen))
        assert judged(lambda impossible: True)[0] == "forged"
        assert judged(lambda impossible: False)[0] == "failed"
        assert judged(lambda impossible: False, holds=False) in [("failed", [True]), ("failed", [False])]
    assert len(orders) == 3


BOOT_USER = "import sys; sys.path.append(sys.argv.pop(1)); from tests.hostile_user import main; main(int(sys.argv[1]))"


def test_the_jail_as_an_unprivileged_user(open_folder):
    """What most users are: nobody who may make namespaces or become another user without asking."""
    if all(problem(level) for level in LOCKED):
        pytest.skip("nothing can lock programs up here")
    for package in ("checkpoints", "evaluation", "tests"):  # this checkout may lie where others cannot read
        shutil.copytree(ROOT / package, open_folder / package, ignore=only_python)
    user = hostile_control.USERS + secrets.randbelow(hostile_control.USERS)
    command = [python_for_all(), "-I", "-S", "-B", "-c", BOOT_USER, str(open_folder), str(user)]
    done = subprocess.run(command, env={}, cwd="/", capture_output=True, text=True, timeout=CONTROL_S, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["level"] for row in rows] == [level.value for level in LOCKED]
    for row in rows:
        assert not row["wrong"], row
        count(
            f"{row['level']} as an unprivileged user" + (f" ({row['problem']})" if row["problem"] else ""), row["ran"]
        )
    if all(row["problem"] for row in rows):
        pytest.skip(f"no level works for an unprivileged user here: {rows}")


def python_for_all() -> str:
    """A Python that any user can start; root's own may lie in a folder that is closed to others."""
    for python in (view.python(), "/usr/local/bin/python3", "/usr/bin/python3"):
        if os.path.exists(python) and view.open_to_all(python):
            check = "import sys; sys.exit(sys.version_info < (3, 11))"
            if subprocess.run([python, "-I", "-S", "-c", check], check=False).returncode == 0:
                return python
    pytest.skip("no Python of 3.11 or newer that another user can start")


def only_python(folder: str, names: list[str]) -> set[str]:
    """For shutil.copytree: what it leaves out."""
    return {name for name in names if not name.endswith((".py", "jail"))}


# ------------------------------------------------------------------------------------------- when something breaks


HARNESS = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("ignore")
from evaluation.sandbox import Level, Program, Sandbox
with Sandbox(Level[sys.argv[2]], workers=2) as sandbox:
    source = f"import ctypes\\nctypes.CDLL(None).prctl(15, {sys.argv[3]!r}.encode())\\nwhile True: pass"
    print("started", flush=True)
    sandbox.run([Program(source, "", 60.0)] * 2)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=lambda how: how.name)
def test_nothing_outlives_a_killed_harness(level, how, open_folder):
    name = process_name()
    command = [sys.executable, "-c", HARNESS, str(ROOT), level.name, name]
    environment = {**os.environ, "TMPDIR": str(open_folder)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as harness:
        assert harness.stdout is not None
        assert harness.stdout.readline() == b"started\n"
        wait_until(lambda: len(processes_named(name)) == 2)
        harness.send_signal(how)
        if how is signal.SIGINT:
            time.sleep(0.1)
            harness.kill()
        wait_until(lambda: not processes_named(name))


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A temporary folder that, unlike pytest's, any user can enter."""
    folder = Path(tempfile.mkdtemp(prefix="test-sandbox-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


def wait_until(holds, patience_s: float = 60.0) -> None:
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_a_broken_jail_is_replaced(lone_sandbox):
    assert verdict(lone_sandbox, "").status == "passed"
    with borrowed(lone_sandbox) as jail:
        jail.process.kill()
        jail.process.wait()
    assert verdict(lone_sandbox, "", "assert 1").status == "passed"


def test_a_jail_that_never_starts_is_an_error(sandbox, monkeypatch):
    def fail(*_):
        raise JailError("no room")

    monkeypatch.setattr(sandbox_module, "judge", fail)
    found = sandbox.run([Program("", "")] * 3)
    assert [(v.status, v.detail) for v in found] == [("error", "no room")] * 3
    monkeypatch.undo()
    assert verdict(sandbox, "").status == "passed"


def test_timeouts_are_run_once_more_alone(sandbox, monkeypatch):
    calls: list[str] = []

    def judge(jail, program, patience):
        calls.append(program.source)
        assert patience == (sandbox_module.PATIENCE if calls.count("slow") == 2 else 1.0)
        if program.source == "slow" and calls.count("slow") == 1:
            return Verdict("timeout", "", 3.0)
        assert program.source == "slow" or calls.count("slow") <= 1
        return Verdict("passed", "", 0.1)

    monkeypatch.setattr(sandbox_module, "judge", judge)
    found = sandbox.run([Program("slow", ""), *[Program(str(i), "") for i in range(5)]])
    assert [v.status for v in found] == ["passed"] * 6
    assert calls.count("slow") == 2
    assert calls[-1] == "slow"


@pytest.mark.parametrize(
    ("own_s", "own_status", "limit_s"), [(0.1, "passed", 3.0), (4.0, "passed", 8.0), (4.0, "failed", 3.0)]
)
def test_a_slow_machine_gives_more_time(sandbox, monkeypatch, own_s, own_status, limit_s):
    """Twice what the item's own solution takes, where that is more than the limit, and only if that solution is right."""
    asked: list[tuple[str, float]] = []

    def judge(jail, program, patience):
        asked.append((program.source, program.timeout_s))
        return Verdict(own_status, "", own_s) if program.source == "own" else Verdict("timeout", "", 3.0)

    monkeypatch.setattr(sandbox_module, "judge", judge)
    assert [v.status for v in sandbox.run([Program("slow", "", reference="own")])] == ["timeout"]
    assert asked == [("slow", 3.0), ("own", sandbox_module.REFERENCE_S), ("slow", limit_s)]


def test_an_interrupt_leaves_the_sandbox_usable(sandbox):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sandbox.run([Program("", "")] * 50, progress=interrupt)
    assert verdict(sandbox, "").status == "passed"


def test_nothing_is_left_in_the_temporary_folder(level, open_folder, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(open_folder))
    with Sandbox(level, workers=1) as sandbox:
        verdict(sandbox, "import os\nos.mkdir('shut', 0)\nopen('x', 'w').write('x')")
    assert list(open_folder.iterdir()) == []


def test_remove_tree_with_what_programs_make(tmp_path):
    target = tmp_path / "runs"
    target.mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("keep")
    (target / "link").symlink_to(outside)
    (target / "shut").mkdir(mode=0)
    (target / "a" / "b").mkdir(parents=True)
    (target / "a" / "link").symlink_to(outside)
    (target / "moved 1").mkdir()
    os.mkfifo(target / "fifo")
    os.chdir(target)
    for _ in range(300):  # longer than a path may be
        os.mkdir("d" * 50)
        os.chdir("d" * 50)
    os.chdir(ROOT)
    remove_tree(str(target))
    assert not target.exists()
    assert (outside / "keep").read_text() == "keep"


# --------------------------------------------------------------------------------------------- which level is taken


def only(*levels: Level):
    return lambda level, memory_bytes=0: None if level in levels else f"no {level.value}"


@pytest.mark.parametrize("works", LOCKED)
def test_probe_takes_the_strongest_that_works(monkeypatch, works):
    monkeypatch.setattr(sandbox_module, "why_not", only(*LOCKED[LOCKED.index(works) :]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert probe(unsafe=True) is works
    assert [str(w.message).startswith("sandbox: only Landlock") for w in caught] == [True] * (works is Level.LANDLOCK)


def test_probe_refuses_where_nothing_works(monkeypatch):
    monkeypatch.setattr(sandbox_module, "why_not", only())
    with pytest.raises(
        InputError, match=r"no bubblewrap; .*no landlock.*apt install bubblewrap.*unsafe_code_execution"
    ):
        Sandbox()
    with pytest.raises(InputError, match="no landlock"):
        Sandbox(Level.LANDLOCK)
    with pytest.warns(UserWarning, match="WITHOUT a lock"):
        assert probe(unsafe=True) is Level.UNSAFE


def test_unsafe_has_to_be_allowed():
    with pytest.raises(InputError, match="unsafe_code_execution"):
        Sandbox(Level.UNSAFE)


def test_unsafe_still_gives_verdicts():
    """Harmless programs only: nothing holds them but limits and a clock."""
    with Sandbox(Level.UNSAFE, unsafe=True, workers=1) as sandbox:
        programs = [Program("x = 1", "assert x == 1"), Program("", "assert 0"), Program("while True: pass", "", LOOP_S)]
        assert [v.status for v in sandbox.run(programs)] == ["passed", "failed", "timeout"]
        found = verdict(sandbox, "import os\nassert os.getuid() != 0 and not os.environ")
        assert found.status == "passed", found.detail


def test_the_trial_finds_a_jail_that_does_not_hold(level, monkeypatch):
    """With a layer left out, a level is not used; the trial is harmless, whatever is left out."""
    monkeypatch.setattr(sandbox_module, "LAYERS", (NAMESPACES, LIMITS))
    start = sandbox_module.start_jail

    def weakened(level, scratch, memory_bytes):
        jail_settings = view.no_room(scratch, (LIMITS,), memory_bytes)
        return Jail(view.python(), jail_settings) if level is Level.LANDLOCK else start(level, scratch, memory_bytes)

    monkeypatch.setattr(sandbox_module, "start_jail", weakened)
    found = why_not(level)
    assert found is not None
    assert "the trial" in found
    with pytest.raises(InputError, match="the trial"):
        Sandbox(level)


# ----------------------------------------------------------------------------------------------- the system-call filter


def decide(program: bytes, architecture: int, number: int, *arguments: int) -> int:
    """What a filter decides: an interpreter of the few instructions that it uses."""
    data = struct.pack("<IIQ6Q", number, architecture, 0, *[*arguments, *[0] * (6 - len(arguments))])
    steps = list(struct.iter_unpack("<HBBI", program))
    accumulator, position = 0, 0
    while True:
        code, yes, no, value = steps[position]
        position += 1
        if code == seccomp.LOAD:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif code == seccomp.AND:
            accumulator &= value
        elif code == seccomp.RETURN:
            return value
        else:
            tests = {
                seccomp.JUMP_EQUAL: accumulator == value,
                seccomp.JUMP_AT_LEAST: accumulator >= value,
                seccomp.JUMP_ANY_BIT: bool(accumulator & value),
            }
            position += yes if tests[code] else no


PID = 7
ALLOWED, REFUSED, UNKNOWN = seccomp.RET_ALLOW, seccomp.RET_ERRNO | 1, seccomp.RET_ERRNO | 38


@pytest.mark.parametrize("machine", sorted(seccomp.ARCHITECTURES))
@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("socket", (2, 1, 0), REFUSED),
        ("execve", (), REFUSED),
        ("ptrace", (16, 1), REFUSED),
        ("io_uring_setup", (8, 0), REFUSED),
        ("clone", (0x01200011,), REFUSED),  # fork
        ("clone", (0x10000011,), REFUSED),  # a user namespace
        ("clone", (0x003D0F00,), ALLOWED),  # a thread
        ("kill", (PID, 9), ALLOWED),
        ("kill", (0xFFFFFFFF, 9), REFUSED),  # -1: everybody
        ("kill", (0, 9), REFUSED),
        ("kill", (PID + 1, 0), REFUSED),
        ("tgkill", (PID, 8, 6), ALLOWED),
        ("tgkill", (1, 1, 6), REFUSED),
        ("prlimit64", (0, 7), ALLOWED),
        ("prlimit64", (PID + 1, 7), REFUSED),
        ("socketpair", (1, 1 | 0o2004000, 0), ALLOWED),  # what asyncio opens
        ("socketpair", (1, 2, 0), REFUSED),
        ("socketpair", (2, 1, 0), REFUSED),
        ("fcntl", (3, 2, 1), ALLOWED),
        ("fcntl", (3, 8, 1), REFUSED),
        ("fcntl", (3, 15, 1), REFUSED),
        ("ioctl", (3, 0x5401), ALLOWED),
        ("ioctl", (3, 0x8901), REFUSED),
        ("prctl", (15, 0), ALLOWED),
        ("prctl", (1, 0), REFUSED),
        ("prctl", (4, 1), REFUSED),
        ("sync", (), REFUSED),
    ],
)
def test_filter(machine, name, arguments, expected):
    program = seccomp.filter_program(machine, PID)
    architecture = seccomp.ARCHITECTURES[machine]
    number = seccomp.NUMBERS[name][seccomp.COLUMN[machine]]
    assert decide(program, architecture, number, *arguments) == expected


@pytest.mark.parametrize("machine", sorted(seccomp.ARCHITECTURES))
def test_filter_on_calls_by_number(machine):
    program = seccomp.filter_program(machine, PID)
    architecture = seccomp.ARCHITECTURES[machine]
    named = {pair[seccomp.COLUMN[machine]] for pair in seccomp.NUMBERS.values()}
    for number in range(424):
        if number not in named:
            assert decide(program, architecture, number) == ALLOWED
    for number in range(424, 700):
        allowed = number in seccomp.NEW_AND_ALLOWED
        assert decide(program, architecture, number) == (ALLOWED if allowed else REFUSED if number == 425 else UNKNOWN)
    assert decide(program, architecture, 0x40000000 + 41) == UNKNOWN  # x32
    assert decide(program, 0x40000003, 11) == seccomp.RET_KILL_PROCESS  # i386


@pytest.mark.skipif(not Path("/usr/include/asm-generic/unistd.h").exists(), reason="no kernel headers to compare with")
def test_filter_numbers_are_the_kernels():
    import re

    text = Path("/usr/include/asm-generic/unistd.h").read_text()
    known = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)$", text, re.M)}
    for name, (_, number) in seccomp.NUMBERS.items():
        assert number is None or known[name] == number, name


def test_rights_known_to_each_version_of_landlock():
    assert [landlock.known_rights(version) for version in (1, 2, 3, 4, 5, 7)] == [
        0x1FFF, 0x3FFF, 0x7FFF, 0x7FFF, 0xFFFF, 0xFFFF,
    ]  # fmt: skip
