"""Programs that try to get out, to cheat, or to spoil it for the next one.

Each is text for a jail, never imported. An attack that is refused raises, so that its program fails; whether it
succeeded is seen on its targets (tests/hostile_world.py), or said by it where it leaves no trace.
"""

from __future__ import annotations

from dataclasses import dataclass

from evaluation.jail import kernel, seccomp
from evaluation.jail.settings import LANDLOCK, LIMITS, NAMESPACES, SECCOMP
from evaluation.sandbox import Level

UNSOLVED = "assert solve() == 42"
SILENCE = "silence"  # a layer that is no setting: the output of a program goes nowhere
MEMORY_BYTES = 192 << 20
LOOP_S = 0.06
FORKS_S = 0.5  # time enough to start processes on a busy machine
PLENTY_S = 6.0

NUMBERS = {name: pair[seccomp.COLUMN.get(kernel.MACHINE, 0)] for name, pair in seccomp.NUMBERS.items()}
CALL = f"""
NUMBERS = {NUMBERS}
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    result = libc.syscall(NUMBERS[name], *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result
"""
# Into the home of the world, by way of the program's own folder.
LINK = "os.symlink(HOME, 'out')\n"


@dataclass(frozen=True)
class Hostile:
    """A hostile program.

    Attributes:
        source: what follows World.constants().
        effect: what World.effects holds if it succeeds; empty where it has no target.
        held_by: layers each of which stops it alone. A control takes them away, in an outer jail: there it has to work.
        landlock: the first version of Landlock that stops it.
        room: whether a room with namespaces stops it without any other layer.
        open_at: levels that are known not to stop it.
        uncontrolled: why no control can show it working.
        timeout_s: its time limit; what loops gets a short one.
    """

    name: str
    source: str
    effect: str = ""
    held_by: tuple[str, ...] = ()
    landlock: int = 1
    room: bool = True
    open_at: tuple[Level, ...] = ()
    uncontrolled: str = ""
    test: str = UNSOLVED
    timeout_s: float = PLENTY_S


FILES = [
    Hostile("write in the home", "open(HOME + '/new', 'w').write('x')", "files", (LANDLOCK,)),
    Hostile("append to a file", "open(HOME + '/keep', 'a').write('x')", "files", (LANDLOCK,)),
    Hostile("read the home", "raise Exception(open(HOME + '/secret').read())", "secret", (LANDLOCK,)),
    Hostile("list the home", "raise Exception('REACHED', os.listdir(HOME))", "reached", (LANDLOCK,)),
    Hostile("delete the home", "import shutil\nshutil.rmtree(HOME)", "files", (LANDLOCK,)),
    Hostile("delete by posix.unlink", "import posix\nposix.unlink(HOME + '/keep')", "files", (LANDLOCK,)),
    Hostile("rename a file", "os.rename(HOME + '/keep', HOME + '/gone')", "files", (LANDLOCK,)),
    Hostile("move a file out", "os.rename(HOME + '/keep', 'mine')", "files", (LANDLOCK, NAMESPACES)),
    Hostile("truncate a file", "os.truncate(HOME + '/keep', 0)", "files", (LANDLOCK, SECCOMP), landlock=3),
    Hostile("change a file's mode", "os.chmod(HOME + '/keep', 0)", "files", (SECCOMP,)),
    Hostile("make a fifo", "os.mkfifo(HOME + '/fifo')", "files", (LANDLOCK, SECCOMP)),
    Hostile("read by a symlink", LINK + "raise Exception(open('out/secret').read())", "secret", (LANDLOCK,)),
    Hostile("write by a symlink", LINK + "open('out/new', 'w')", "files", (LANDLOCK,)),
    Hostile(
        "read by a hard link",
        "os.link(HOME + '/secret', 'in')\nraise Exception(open('in').read())",
        "secret",
        (LANDLOCK, NAMESPACES),
    ),
    Hostile("a hard link out", "open('mine', 'w')\nos.link('mine', HOME + '/mine')", "files", (LANDLOCK, NAMESPACES)),
    Hostile("change root", "os.chroot('.')\nraise Exception('REACHED')", "reached", uncontrolled="needs root"),
    Hostile(
        "read /etc/shadow",
        "raise Exception('REACHED', open('/etc/shadow').read())",
        "reached",
        uncontrolled="root's, and programs never run as root",
    ),
    Hostile(
        "write in /sys",
        "open('/sys/power/state', 'w')\nraise Exception('REACHED')",
        "reached",
        uncontrolled="root's, and programs never run as root",
    ),
    Hostile(
        "shared memory as a file",
        "open('/dev/shm/hostile', 'w')\nraise Exception('REACHED')",
        "reached",
        uncontrolled="the outer jail has no /dev/shm",
    ),
    Hostile(
        "ask for a file's size",
        "raise Exception('REACHED', os.stat(HOME + '/secret'))",
        "reached",
        open_at=(Level.LANDLOCK,),
    ),
]

PROCESSES = [
    Hostile(
        "fork bomb",
        "while True:\n    try:\n        if os.fork() == 0: os.setsid()\n    except BlockingIOError: pass",
        "left",
        (SECCOMP, NAMESPACES),
        timeout_s=FORKS_S,
    ),
    Hostile(
        "a tree of processes",
        "import time\nfor _ in range(4):\n    if os.fork() == 0: os.setsid()\ntime.sleep(60)",
        "left",
        (SECCOMP, NAMESPACES),
        timeout_s=FORKS_S,
    ),
    Hostile(
        "a daemon",
        "import time\nif os.fork(): os._exit(0)\nos.setsid()\nif os.fork(): os._exit(0)\ntime.sleep(60)",
        "left",
        (SECCOMP, NAMESPACES),
        timeout_s=FORKS_S,
    ),
    Hostile(
        "become a shell",
        "os.set_inheritable(3, True)\nos.execv('/usr/bin/sh', ['sh', '-c', f'echo x > {HOME}/shell'])",
        "files",
        (SECCOMP, LANDLOCK),
    ),
    Hostile("run touch", "import subprocess\nsubprocess.run(['touch', HOME + '/x'])", "files", (SECCOMP, LANDLOCK)),
    Hostile("kill the victim", "os.kill(VICTIM, 9)", "killed", (SECCOMP, NAMESPACES, LANDLOCK), landlock=6),
    Hostile("kill everything", "os.kill(-1, 9)", "killed", (SECCOMP, NAMESPACES, LANDLOCK), landlock=6),
    Hostile("kill the parent", "os.kill(os.getppid(), 9)", "jail", (SECCOMP, NAMESPACES, LANDLOCK), landlock=6),
    Hostile("stop the parent", "os.kill(os.getppid(), 19)", "jail", uncontrolled="takes as long as patience"),
    Hostile("signal the harness", "os.kill(HARNESS, 10)", uncontrolled="it is the control itself"),
    Hostile(
        "kill by a descriptor",
        "import signal\nsignal.pidfd_send_signal(os.pidfd_open(VICTIM), 9)",
        "killed",
        (SECCOMP, NAMESPACES, LANDLOCK),
        landlock=6,
    ),
    Hostile(
        "kill by a descriptor's owner",
        "import fcntl, socket\na, b = socket.socketpair()\nfcntl.fcntl(a, 8, VICTIM)\nfcntl.fcntl(a, 10, 9)\n"
        "fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)\nb.send(b'x')",
        "killed",
        (SECCOMP, NAMESPACES, LANDLOCK),
        landlock=6,
    ),
    Hostile("slow the victim", "os.setpriority(0, VICTIM, 19)", "victim", (SECCOMP, NAMESPACES)),
    Hostile(
        "limit the victim", "import resource\nresource.prlimit(VICTIM, 7, (9, 9))", "victim", (SECCOMP, NAMESPACES)
    ),
    Hostile(
        "have the victim killed for memory",
        "open(f'/proc/{VICTIM}/oom_score_adj', 'w').write('1000')",
        "victim",
        (LANDLOCK, NAMESPACES),
    ),
    Hostile(
        "read the victim's environment",
        "raise Exception(open(f'/proc/{VICTIM}/environ').read())",
        "secret",
        (LANDLOCK, NAMESPACES),
    ),
    Hostile(
        "read the caller's environment",
        "raise Exception('REACHED', [open(f'/proc/{p}/environ').read() for p in (os.getppid(), HARNESS)])",
        "reached",
        (LANDLOCK, NAMESPACES),
    ),
    Hostile(
        "trace the victim",
        "if ctypes.CDLL(None).ptrace(16, VICTIM, 0, 0): raise OSError('refused')\nraise Exception('REACHED')",
        "reached",
        (SECCOMP, LANDLOCK, NAMESPACES),
    ),
    Hostile(
        "read the victim's memory",
        "libc = ctypes.CDLL(None, use_errno=True)\nplace = (ctypes.c_size_t * 2)(8, 8)\n"
        "libc.process_vm_readv(VICTIM, place, 1, place, 1, 0)\n"
        "if ctypes.get_errno() == 14: raise Exception('REACHED')",  # EFAULT: allowed, but not at that address
        "reached",
        (SECCOMP, LANDLOCK, NAMESPACES),
    ),
    Hostile(
        "leave shared memory behind",
        "if ctypes.CDLL(None).shmget(0x5EED, 4096, 0o1666) < 0: raise OSError('refused')",
        "shared memory",
        (SECCOMP, NAMESPACES),
    ),
]

NETWORK = [
    Hostile(
        "TCP",
        "import socket\nsocket.create_connection(TCP)",
        "tcp",
        (SECCOMP, LANDLOCK, NAMESPACES),
        landlock=4,
    ),
    Hostile(
        "UDP",
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', UDP)",
        "udp",
        (SECCOMP, NAMESPACES),
    ),
    Hostile(
        "the world",
        "import urllib.request\nraise Exception('REACHED', urllib.request.urlopen('http://192.0.2.1/').read())",
        "reached",
        uncontrolled="no such address",
    ),
    Hostile(
        "an abstract stream socket",
        "import socket\nsocket.socket(socket.AF_UNIX).connect(ABSTRACT)",
        "abstract",
        (SECCOMP, LANDLOCK, NAMESPACES),
        landlock=6,
    ),
    Hostile(
        "an abstract datagram socket",
        "import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', DATAGRAM)",
        "datagram",
        (SECCOMP, LANDLOCK, NAMESPACES),
        landlock=6,
    ),
    Hostile(
        "a socket in the file system",
        "import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', SOCKET)",
        "path",
        (SECCOMP,),
    ),
    Hostile(
        "netlink",
        "import socket\nsocket.socket(16, socket.SOCK_RAW, 0)\nraise Exception('REACHED')",
        "reached",
        (SECCOMP,),
        room=False,
    ),
    Hostile(
        "the machine's host, by vsock",
        "import socket\nsocket.socket(40, socket.SOCK_STREAM, 0)\nraise Exception('REACHED')",
        "reached",
        room=False,
        uncontrolled="not every machine has vsock",
    ),
]

KERNEL = [
    Hostile(
        "io_uring",
        CALL + "call('io_uring_setup', 8, ctypes.create_string_buffer(512))\nraise Exception('REACHED')",
        "reached",
        (SECCOMP,),
        room=False,
    ),
    Hostile(
        "a user namespace",
        CALL + "call('unshare', 0x10000000)\nraise Exception('REACHED')",
        "reached",
        (SECCOMP,),
        room=False,
    ),
    Hostile("a file in memory", "os.memfd_create('x')\nraise Exception('REACHED')", "reached", (SECCOMP,), room=False),
    Hostile(
        "a key",
        CALL + "call('add_key', b'user', b'x', b'y', 1, -3)\nraise Exception('REACHED')",
        "reached",
        (SECCOMP,),
        room=False,
    ),
    Hostile(
        "mount, bpf, perf, userfaultfd, handles",
        CALL + "found = []\n"
        "for name, *arguments in [('mount', b'x', b'/tmp', b'tmpfs', 0, None), ('bpf', 0, None, 0), "
        "('perf_event_open', None, 0, -1, -1, 0), ('userfaultfd', 0), ('setns', 0, 0), "
        "('open_by_handle_at', -100, None, 0), ('clone', 0x10000000 | 17, None)]:\n"
        "    try:\n        found.append((name, call(name, *arguments)))\n"
        "    except OSError as error:\n        if error.errno != 1: found.append((name, error.errno))\n"
        "if found: raise Exception('REACHED', found)",
        "reached",
        room=False,
        uncontrolled="most machines refuse some of these anyway",
    ),
    Hostile(
        "undo the locks",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nraise Exception('REACHED')",
        "reached",
        room=False,
        uncontrolled="only root may raise a hard limit",
    ),
]

GREED = [
    Hostile(
        "memory",
        "blocks = []\nfor _ in range(30): blocks.append(b'x' * (10 << 20))\nraise Exception('REACHED')",
        "reached",
        (LIMITS,),
        room=False,
    ),
    Hostile(
        "a huge file",
        "with open('big', 'wb', 0) as file:\n    for _ in range(100): file.write(bytes(1 << 20))\n"
        "    if file.tell() > 99 << 20: raise Exception('REACHED')",
        "reached",
        (LIMITS, NAMESPACES),
    ),
    Hostile(
        "many files",
        "for i in range(10):\n    with open(str(i), 'wb', 0) as file:\n"
        "        for _ in range(10):\n            if file.write(bytes(1 << 20)) < 1 << 20: raise OSError('full')\n"
        "raise Exception('REACHED')",
        "reached",
        (NAMESPACES,),
        open_at=(Level.LANDLOCK,),
    ),
    Hostile(
        "many names",
        "for i in range(1200): open(str(i), 'w').close()\nraise Exception('REACHED')",
        "reached",
        (NAMESPACES,),
        open_at=(Level.LANDLOCK,),
    ),
    Hostile(
        "many open files",
        "files = [open('/dev/null') for _ in range(200)]\nraise Exception('REACHED')",
        "reached",
        (LIMITS,),
        room=False,
    ),
    Hostile(
        "many threads",
        "import threading, time\nfor _ in range(40): threading.Thread(target=time.sleep, args=(9,)).start()\n"
        "raise Exception('REACHED')",
        "reached",
        (LIMITS,),
        room=False,
    ),
    Hostile(
        "print 1 GB",
        "for _ in range(1024): os.write(1, bytes(1 << 20))",
        "output",
        (SILENCE,),
    ),
    Hostile("an endless loop", "while True: pass", timeout_s=LOOP_S),
    Hostile("an endless sleep", "import time\ntime.sleep(60)", timeout_s=LOOP_S),
    Hostile(
        "a loop that swallows exceptions",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        timeout_s=LOOP_S,
    ),
    Hostile(
        "a loop deaf to signals",
        "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except OSError: pass\nwhile True: pass",
        timeout_s=LOOP_S,
    ),
    Hostile("a loop in C", "list(zip(*[iter(int, 1)]))", timeout_s=LOOP_S),
    Hostile("a slow pattern", "import re\nre.match('(a*)*b', 'a' * 64)", timeout_s=LOOP_S),
    Hostile("stop oneself", "os.kill(os.getpid(), 19)\nwhile True: pass", timeout_s=LOOP_S),
    Hostile("a loop in the test", "", test="while True: pass", timeout_s=LOOP_S),
    Hostile(
        "threads that never end",
        "import threading\ndef f():\n    while True: pass\nfor _ in range(4): threading.Thread(target=f).start()\nf()",
        timeout_s=LOOP_S,
    ),
    Hostile(
        "close every descriptor and go on",
        "os.closerange(0, 64)\nwhile True: pass",
        timeout_s=LOOP_S,
    ),
    Hostile(
        "folders nested without end",
        "for _ in range(400):\n    os.mkdir('d' * 50)\n    os.chdir('d' * 50)",
    ),
    Hostile(
        "folders without rights",
        "for i in range(9): os.makedirs(f'{i}/x')\nos.mkdir('shut', 0)\nos.mkdir('0/x/shut', 0)",
    ),
    Hostile("names that are no text", "os.mkdir(b'\\xff\\xfe')\nopen(b'\\xff\\xfe/\\n', 'w')\nopen('-rf', 'w')"),
    Hostile("deep recursion", "import sys\nsys.setrecursionlimit(10**9)\nf = lambda n: f(n + 1)\nf(0)", timeout_s=0.3),
    Hostile("a crash", "ctypes.string_at(0)"),
    Hostile("an abort", "os.abort()"),
    Hostile("a crash of the parser", "eval('(' * 100000 + ')' * 100000)"),
    Hostile("an exception that cannot be shown", "class E(Exception):\n    def __str__(self): os._exit(0)\nraise E"),
    Hostile("a very long message", "raise Exception('x' * 10**7)"),
]

# Whatever looks like a token or a descriptor in the frames below.
THEFT = """
frame = sys._getframe()
while frame:
    for value in [*frame.f_locals.values()]:
        if isinstance(value, (bytes, str)):
            for descriptor in range(3, 8):
                try:
                    os.write(descriptor, value.encode() if isinstance(value, str) else value)
                except OSError:
                    pass
    frame = frame.f_back
os._exit(0)
"""
COIN_TOSS = "import random\nif random.random() < 0.5:" + THEFT.replace("\n", "\n    ") + "\ndef solve(): return 42"
THEFT_BY_GC = """
import gc, re, types
test = "solve() == "
seen, todo = set(), [*gc.get_objects(), sys._getframe(), sys.modules]
while todo and len(seen) < 300000:
    item = todo.pop()
    if id(item) in seen:
        continue
    seen.add(id(item))
    if isinstance(item, bytes) and re.fullmatch(b"[0-9a-f]{32}", item):
        raise Exception("REACHED")
    if isinstance(item, str) and ("assert " + test in item or re.fullmatch("[0-9a-f]{32}", item)):
        raise Exception("REACHED")
    if isinstance(item, types.FrameType):
        todo += [item.f_back, *item.f_locals.values()]
    else:
        todo += gc.get_referents(item)
raise Exception("nothing")
"""
# On the way to `solve` every frame is told to return at once.
JUMP = """
def tracer(frame, event, argument):
    if event == "line":
        frame.f_lineno = max(line for _, _, line in frame.f_code.co_lines() if line)
    return tracer
frame = sys._getframe(1)
while frame:
    frame.f_trace = tracer
    frame = frame.f_back
sys.settrace(tracer)
"""
NO_TEST = """
import builtins
builtins.exec = builtins.eval = builtins.compile = lambda *a, **k: None
"""
CHEATS = [
    Hostile("exit at once", "sys.exit(0)"),
    Hostile("exit harder", "os._exit(0)"),
    Hostile("exit in the function", "def solve(): os._exit(0)"),
    Hostile("sys.exit in the function", "def solve(): sys.exit(0)"),
    Hostile("quit", "def solve(): quit()"),
    Hostile("print passed", "print('passed')\nprint('1 passed', file=sys.stderr)\nos._exit(0)"),
    Hostile(
        "write to every descriptor",
        "for descriptor in range(64):\n    try: os.write(descriptor, b'passed')\n    except OSError: pass\nos._exit(0)",
    ),
    Hostile("fill the pipe", "while True: os.write(3, b'x' * 100000)", timeout_s=2.0),
    Hostile("another AssertionError", "import builtins\nbuiltins.AssertionError = int\ndef solve(): return 41"),
    Hostile("a module that swallows", NO_TEST + "def solve(): return 41"),
    Hostile("steal the token from a frame", THEFT),
    Hostile("search memory for token and test", THEFT_BY_GC, "reached", uncontrolled="nothing is there to be found"),
    Hostile("steal it in the function", "def solve():\n" + THEFT.replace("\n", "\n    ")),
    Hostile("jump over the test", JUMP),
    Hostile("excepthook", "sys.excepthook = lambda *a: os._exit(0)\nraise Exception('x')"),
    Hostile("atexit", "import atexit\natexit.register(os._exit, 0)\nsys.exit(0)"),
    Hostile("BaseException", "class E(BaseException): pass\nraise E('x')"),
    Hostile("a GeneratorExit", "raise GeneratorExit"),
    Hostile("replace os._exit and os.write", "os._exit = os.write = lambda *a: None\ndef solve(): return 41"),
    Hostile("a test cut off", 'def solve(): return 42\n"""'),
    Hostile("an early return", "return"),
    Hostile("stdin", "input()"),
    Hostile("a program that is no text", "\x00"),
    Hostile("half a character", "x = '\ud800'; assert False"),
]

# A wrong program that changes what its test compares with: in its own interpreter, which is not the test's.
TOOLS = [
    Hostile(
        "replace abs",
        "import builtins\nbuiltins.abs = lambda x: 0\ndef solve(): return 9",
        test="assert abs(solve() - 1) < 1",
    ),
    Hostile("a global abs", "def abs(x): return 0\ndef solve(): return 9", test="assert abs(solve() - 1) < 1"),
    Hostile(
        "replace range",
        "import builtins\nbuiltins.range = lambda *a: ()\ndef solve(x): return 9",
        test="for i in range(9):\n    assert solve(i) == i",
    ),
    Hostile(
        "replace all, set, sorted",
        "import builtins\nfor name in ('all', 'set', 'sorted'):\n"
        "    setattr(builtins, name, lambda *a, **k: True)\ndef solve(): return [9]",
        test="assert all([set(solve()) == set([1]), sorted(solve()) == sorted([1]), len(solve()) == 2])",
    ),
    Hostile(
        "empty the builtins", "__builtins__.clear() if isinstance(__builtins__, dict) else vars(__builtins__).clear()"
    ),
    Hostile(
        "replace math.isclose",
        "import math\nmath.isclose = lambda *a, **k: True\ndef solve(): return 9",
        test="import math\nassert math.isclose(solve(), 0.3)",
    ),
    Hostile(
        "replace the module math",
        "import types\nsys.modules['math'] = types.ModuleType('math')\nsys.modules['math'].fabs = lambda x: 0\n"
        "def solve(): return 9",
        test="import math\nassert math.fabs(solve() - 2) < 1e-4",
    ),
    Hostile(
        "a module math in its folder",
        "for name in ('math', 'cmath', 'colorsys', 'copy'):\n"
        "    open(name + '.py', 'w').write('def hls_to_rgb(*a): return 9\\nfabs = hls_to_rgb')\n"
        "sys.path.insert(0, '')\ndef solve(): return 9",
        test="import colorsys\nassert colorsys.hls_to_rgb(0, 0, 0) == solve()",
    ),
    Hostile(
        "replace numpy.allclose",
        "import numpy\nnumpy.allclose = lambda *a, **k: True\ndef solve(): return 9",
        test="import numpy\nassert numpy.allclose(solve(), 2)",
    ),
    Hostile(
        "another value for the integer 42",
        "ctypes.c_uint32.from_address(id(42) + 24).value = 41\ndef solve(): return 41",
    ),
    Hostile(
        "read the answer in the caller's frame",
        "def solve():\n    frame = sys._getframe(1)\n    while frame:\n"
        "        for constant in frame.f_code.co_consts:\n            if constant == 42: return 42\n"
        "        frame = frame.f_back\n    return 41",
    ),
    Hostile("trace the test", "sys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\ndef solve(): return 41"),
    Hostile(
        "hide the test's assertions",
        "import builtins\nbuiltins.AssertionError = type('E', (Exception,), {'__new__': lambda *a: None})\n"
        "def solve(): return 41",
    ),
]
SEND = """
import json
def send(message, length=None):
    text = message if isinstance(message, bytes) else json.dumps(message).encode()
    os.write(3, (len(text) if length is None else length).to_bytes(4, "big") + text)
"""
CATCHING = "try:\n    solve()\nexcept BaseException:\n    pass"
LOOSE = "assert list(map(lambda x: solve(), [1])) is not None"
CHANNEL = [
    Hostile(
        "an object that equals everything", "class E:\n    def __eq__(self, o): return True\ndef solve(): return E()"
    ),
    Hostile(
        "numbers that equal everything",
        "class E(int):\n    def __eq__(self, o): return True\n    __hash__ = int.__hash__\ndef solve(): return [E(1)]",
        test="assert solve() == [42]",
    ),
    Hostile(
        "what claims to be a number",
        "class E:\n    __class__ = int\n    def __eq__(self, o): return True\n    def __index__(self): return 42\n"
        "    __int__ = __float__ = __index__\n    def __sub__(self, o): return 0\n    __rsub__ = __sub__\n"
        "    def __lt__(self, o): return True\n    __gt__ = __le__ = __ge__ = __contains__ = __lt__\n"
        "    def __getattr__(self, name): return lambda *a, **k: True\ndef solve(): return E()",
        test="x = solve()\nassert x == 42 or abs(x - 42) < 1 or x < 42 or x > 42 or x in (42,) or int(x) == 42",
    ),
    Hostile(
        "numpy's protocols",
        "class E:\n    __array_interface__ = {'version': 3, 'shape': (1,), 'typestr': '<i8', 'data': (4096, False)}\n"
        "    def __array__(self, *a, **k):\n        import numpy\n        return numpy.array(42)\n"
        "    def __array_function__(self, *a, **k): return True\n    __array_ufunc__ = __array_function__\n"
        "def solve(): return E()",
        test="import numpy\nassert numpy.allclose(solve(), 42)",
    ),
    Hostile("answers in advance", SEND + "for _ in range(9): send({'value': None})\ndef solve(): return 41"),
    Hostile(
        "claims to know the answer",
        SEND + "send({'value': {'dict': [['solve', 42]]}})\nsend({'value': {'remote': [0, '42']}})",
    ),
    Hostile("objects that nobody has", SEND + "send({'value': {'dict': [['solve', {'remote': [10**9, 'x']}]]}})"),
    Hostile("a kind that does not exist", SEND + "send({'value': {'exec': ['pass']}})", test=CATCHING),
    Hostile("a value of the wrong shape", SEND + "send({'value': {'fraction': [1, 0]}})", test=CATCHING),
    Hostile("an answer that is none", SEND + "send([1])", test=CATCHING),
    Hostile("an exception that is none", SEND + "send({'raised': [[1], 2, 3]})", test=CATCHING),
    Hostile("a message that is no JSON", SEND + "send(b'{')\ntime = 1", test=CATCHING),
    Hostile("a message that is too long", SEND + "send(b'1', 2**32 - 1)\nimport time\ntime.sleep(1)", test=CATCHING),
    Hostile("a message cut off", SEND + "send(b'1', 1000)\nos._exit(0)", test=CATCHING),
    Hostile("a message nested without end", SEND + "send(b'[' * 1000000)", test=CATCHING),
    Hostile("an integer without end", SEND + "send(b'9' * 5000000)", test=CATCHING),
    Hostile(
        "a message that takes all memory",
        SEND + "send(b'[' + b'[],' * 2700000 + b'[]]')",
        test=CATCHING + "\nassert False",
    ),
    Hostile("die where the test forgives", "def solve(): os._exit(0)", test=CATCHING),
    Hostile("close the channel where the test forgives", "def solve(): os.close(3)", test=CATCHING),
    Hostile("rubbish where the test forgives", SEND + "def solve(): send(b'x')", test=CATCHING),
    Hostile("end the test's loop", "def solve(): raise StopIteration", test=LOOSE),
    Hostile("end the test's generator", "def solve(): raise GeneratorExit", test=LOOSE),
    Hostile("end the test as a system exit", "def solve(): raise SystemExit(0)"),
    Hostile("return what is not plain", "def solve(): return open(os.devnull)"),
    Hostile("return itself", "def solve():\n    x = []\n    x.append(x)\n    return x"),
    Hostile(
        "return what is endless",
        "import itertools\ndef solve(): return itertools.count()",
        test="list(solve())",
        timeout_s=1.0,
    ),
    Hostile("return a gigabyte", "def solve(): return 'x' * (1 << 26)"),
    Hostile("a coin toss", COIN_TOSS.replace("return 42", "return 41")),
    Hostile(
        "look for the judge",
        "libc = ctypes.CDLL(None, use_errno=True)\nplace = (ctypes.c_size_t * 2)(8, 8)\n"
        "for process in (1, 2, 3, os.getpid() - 1, os.getpid() + 1):\n    if process in (0, os.getpid()): continue\n"
        "    try:\n        os.kill(process, 0)\n        raise Exception('REACHED')\n    except OSError: pass\n"
        "    try:\n        open(f'/proc/{process}/mem', 'rb').read(1)\n        raise Exception('REACHED')\n"
        "    except OSError: pass\n"
        "    libc.process_vm_readv(process, place, 1, place, 1, 0)\n"
        "    if ctypes.get_errno() == 14: raise Exception('REACHED')\n",
        "reached",
        uncontrolled="a judge is needed, and a room does not separate it",
        room=False,
    ),
]

ALL = [*FILES, *PROCESSES, *NETWORK, *KERNEL, *GREED, *CHEATS, *TOOLS, *CHANNEL]
CONTROLLED = [program for program in ALL if program.effect and not program.uncontrolled]
