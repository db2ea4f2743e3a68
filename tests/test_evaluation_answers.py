"""Answers of mathematical responses: what is extracted, and what counts as equal."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evaluation.benchmarks import get_benchmark
from evaluation.benchmarks.settings import Settings
from evaluation.benchmarks.wcot import question
from evaluation.grading.answers import extract_answer, last_boxed, last_number
from evaluation.grading.letters import read_letter
from evaluation.grading.tools import Tools
from tests.evaluation_files import rows_of

# (reference, response, equal): pairs judged by hand. One, marked, is graded differently: math-verify and the paper's checker both
# overlook the base of a number.
PAIRS = [
    (r"\frac{1}{2}", r"\boxed{\dfrac{1}{2}}", True),
    (r"\frac{1}{2}", r"\boxed{0.5}", True),
    (r"\frac{1}{2}", r"\boxed{1/2}", True),
    (r"\frac{14}{3}", r"\boxed{\frac{14}3}", True),
    (r"\frac{14}{3}", r"\boxed{4\frac{2}{3}}", True),
    (r"\frac{1}{3}", r"\boxed{0.333}", False),
    (r"90^\circ", r"\boxed{90}", True),
    ("90", r"\boxed{90^{\circ}}", True),
    ("[0,1)", r"\boxed{[0,1)}", True),
    ("[0,1)", r"\boxed{[0,1]}", False),
    (r"(-\infty,2]\cup[3,\infty)", r"\boxed{(-\infty, 2] \cup [3, \infty)}", True),
    ("(1,2)", r"\boxed{(2,1)}", False),
    (r"(3,\frac{\pi}{2})", r"\boxed{\left(3, \frac{\pi}{2}\right)}", True),
    ("1,2,3", r"\boxed{3,2,1}", True),
    ("1000", r"\boxed{1,000}", True),
    ("10,080", r"\boxed{10080}", True),
    (r"50\%", r"\boxed{50}", True),
    ("50", r"\boxed{0.5}", False),
    (r"\$18", r"\boxed{18}", True),
    (r"5\text{ cm}", r"\boxed{5}", True),
    ("12", r"\boxed{12 \text{ inches}}", True),
    (r"\text{Evelyn}", r"\boxed{Evelyn}", True),
    (r"\text{even}", r"\boxed{\text{odd}}", False),
    (r"\sqrt{12}", r"\boxed{2\sqrt{3}}", True),
    (r"\frac{\sqrt{3}}{3}", r"\boxed{\frac{1}{\sqrt{3}}}", True),
    (r"2\sqrt{3}", r"\boxed{3.4641}", False),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\boxed{\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}}", True),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\boxed{\begin{bmatrix} 1 & 2 \\ 3 & 5 \end{bmatrix}}", False),
    ("x^2+2x+1", r"\boxed{(x+1)^2}", True),
    ("x=5", r"\boxed{5}", True),
    ("y=2x+3", r"\boxed{2x+3}", True),
    ("2+3i", r"\boxed{3i+2}", True),
    ("10_{3}", r"\boxed{10}", True),  # judged False by hand
    (r"\text{(B)}", r"\boxed{B}", True),
    (r"-\frac{2}{3}", r"\boxed{\frac{-2}{3}}", True),
    ("3", "The answer is: 3", True),
    ("72", "#### 72", True),
    ("72", "so he sold 72 clips in 2 months. The answer is: 72.", True),
    ("18", "She makes $18 every day.", True),
    ("0", r"\boxed{}", False),
    ("2^{10}", r"\boxed{1024}", True),
    # beyond the notes
    ("5", r"We get \boxed{4}, no: \boxed{5}", True),
    (r"\frac{3}{4}", "The answer is $\\frac34$. I hope it is correct.", True),
    (r"\frac{3}{4}", "Thus the answer is: \\[\\frac{3}{4}\\] which is less than 1.", True),
    ("7", "Final Answer: The final answer is $7$. I hope it is correct.", True),
    ("7", "so we add them.\n\n# Answer\n\n7", True),
    ("12", "Answer: 12", True),
    ("12", "The answer is the number of ways to choose 2 of 5 people", False),
    (r"\text{(C)}", "The answer is (C).", True),
    ("4", r"\boxed{4", True),
    ("4", r"\boxed 4$", True),
    (r"\text{June 20}", r"\boxed{June 20}", True),
    (r"\text{June 20}", "The answer is June 21.", False),
    (r"32,\!348", "The answer is $32,348$.", True),
    ("3", "", False),
    ("3", "I do not know.", False),
    ("1", "9^(9^(9^9))", False),
]


@pytest.fixture(scope="module")
def tools():
    with Tools(Settings()) as tools:
        yield tools


def grade(tools, pairs, style):
    return tools.compare_answers([(gold, extract_answer(text, style)) for gold, text, _ in pairs], lambda count: None)


def test_pairs_judged_by_hand(tools):
    verdicts = grade(tools, PAIRS, "math")
    wrong = [pair for pair, verdict in zip(PAIRS, verdicts, strict=True) if (verdict == "right") != pair[2]]
    assert wrong == []


NUMBERS = [
    ("18", "She has 9 left\nShe makes 2 * 9 = $<<2*9=18>>18 a day\nA: 18", True),
    ("90000", "This means 130,000-40,000=$90,000\nA: 90,000", True),
    ("3", "So it takes 2+1=3.0 bolts\nA: 3.0", True),
    ("-5", "It fell to -5", True),
    ("13", "he has 16-3", False),
    ("3", "he has 16-3", True),
    ("18", "The answer is 18 eggs.", True),
    ("18", "The answer is: $18.00 a day.", True),
    ("8", "The answer is 5 + 3 = 8.", True),
    ("18", r"\boxed{18 eggs}", True),
    ("18", "**The answer is 18.**\nHe is 20 years old.", True),
    ("18", "#### 18 dollars\n", True),
    ("18", "The answer is unknown", False),
    ("18", "no numbers here", False),
    ("18", "", False),
]


def test_numbers(tools):
    verdicts = grade(tools, NUMBERS, "number")
    wrong = [pair for pair, verdict in zip(NUMBERS, verdicts, strict=True) if (verdict == "right") != pair[2]]
    assert wrong == []


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"a \boxed{x} b", "x"),
        (r"\boxed{1} then \fbox{2}", "2"),
        (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
        (r"\boxed {7}", "7"),
        (r"\boxed7$ and 8", "7"),
        ("so boxed{9}", "9"),
        ("we boxed the apples", None),
        (r"\boxed{}", ""),
        (r"\boxed{\begin{cases}1\\{2}\end{cases}}", r"\begin{cases}1\\{2}\end{cases}"),
        ("nothing", None),
    ],
)
def test_last_boxed(text, inside):
    assert last_boxed(text) == inside


@pytest.mark.parametrize(
    ("text", "number"),
    [("1,234.5 m", "1234.5"), ("3.", "3"), (".5", ".5"), ("v1.2", "1.2"), ("x", None), ("5-10", "10"), ("is -4", "-4")],
)
def test_last_number(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" C", "C"),
        ("(D) because", "D"),
        ("A. The first", "A"),
        ("The answer is (B).", "B"),
        ("I think the answer is C", "C"),
        ("Answer: D", "D"),
        ("A man walks", "A"),
        ("An apple", None),
        ("E", None),
        ("", None),
    ],
)
def test_letters(text, letter):
    assert read_letter(text, "ABCD") == letter


def test_questions_with_two_answers_offer_both():
    assert question({"question": " Is it? ", "target": r"\text{Yes}"}) == "Is it? (Yes or No)"
    assert question({"question": "Is it?", "target": "false"}) == "Is it? (True or False)"
    assert question({"question": "How many?", "target": "4"}) == "How many?"


@pytest.mark.command
def test_a_comparison_that_does_not_end_costs_its_worker_only(monkeypatch, tools):
    """An expression inside one C call cannot be interrupted by a signal; the pool kills its process."""
    from evaluation.grading.pool import WorkerPool

    with WorkerPool("tests.test_evaluation_answers:spin", workers=2, timeout_s=1.5) as pool:
        outcomes = pool.map([["fine"], ["hang"], ["die"], ["raise"], ["fine"], ["memory"], ["fine"]])
    assert [outcome.status for outcome in outcomes] == ["done", "timeout", "error", "error", "done", "error", "done"]
    assert outcomes[3].detail == "ValueError: as asked"


def spin(what: str) -> str:
    """Runs in a worker of the pool."""
    import os

    if what == "hang":
        return str(pow(3, 10**11, 10**4000))[:0] or str(3 ** (10**10))
    if what == "die":
        os._exit(3)
    if what == "raise":
        raise ValueError("as asked")
    if what == "memory":
        return "x" * (1 << 40)
    return what


ROOT = Path(__file__).resolve().parent.parent
WORKER = [sys.executable, "-m", "evaluation.grading.worker"]
GRADING = """
import sys
from evaluation.grading import pool
class Told(pool._Worker):
    def take(self):
        outcome = super().take()
        if self._ready:
            print(self._process.pid, flush=True)
        return outcome
pool._Worker = Told
with pool.WorkerPool("time:sleep", workers=1, timeout_s=600.0) as workers:
    workers.map([[600]])
"""


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot tie a process to its parent")
def test_a_worker_dies_with_a_killed_command():
    """As after `kill -9`, or out of memory: nobody is left to hold the clock."""
    with subprocess.Popen([sys.executable, "-c", GRADING], stdout=subprocess.PIPE, cwd=ROOT, text=True) as command:
        assert command.stdout is not None
        worker = int(command.stdout.readline())
        assert lives(worker)
        command.kill()
    deadline = time.monotonic() + 60
    while lives(worker):
        assert time.monotonic() < deadline, "the worker outlived its command"
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot tie a process to its parent")
def test_a_worker_whose_parent_is_gone_already_ends_at_once():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    done = subprocess.run(
        [*WORKER, "time:sleep", "9", str(gone.pid)], cwd=ROOT, capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (1, b"")


def test_a_worker_ends_at_its_processor_time():
    """Inside one call that no signal handler interrupts; each item has its own time."""
    command = [*WORKER, "builtins:pow", "0.1", str(os.getpid())]
    items = b"[2, 10]\n[3, 10000000000]\n"
    done = subprocess.run(command, input=items, cwd=ROOT, capture_output=True, timeout=300, check=False)
    assert done.stdout.splitlines() == [b'{"ready": true}', b'{"result": 1024}']
    assert done.returncode == -signal.SIGXCPU


def test_math_verify_alone_takes_the_published_solutions_for_right():
    """Equal texts are right before math-verify is asked; it would say the same."""
    from math_verify import parse, verify

    for name in ("math", "gsm8k"):
        for row in rows_of(name):
            target = get_benchmark(name).read_row(row)["target"]
            forms = extract_answer(row["solution" if name == "math" else "answer"], "math").forms
            assert any(verify(parse(f"${target}$"), parse(form)) for form in forms), (target, forms)
