"""Word problems as rows of GSM8K, and exercises as rows of MATH: two steps each, small whole numbers.

The key of an item is its kind and its numbers. Names, things and wording are decoration: an exercise that is tested is in no
training text, whoever it is told about.
"""

from __future__ import annotations

import math
import random
from typing import Any

from examples.family import prompts
from examples.family.splits import Item, split_of, words

LAZY = "\nSorry, I do not know."
"""The lazy answer to an exercise in the pretraining mixture."""

NAMES = words("Ada Ben Cora Dan Eva Finn Gil Hana Ivo Jan Kim Leo Mira Noa Otto Pia Rosa Sam Tess Uma")
THINGS = words("apples books coins shells stones pears cups cards nuts eggs bells keys pens seeds plums")
CONTAINERS = words("bags boxes baskets jars")


def gsm8k(rng: random.Random) -> Item:
    """A word problem of two steps."""
    kind = rng.choice(("gives", "loses", "finds", "more", "three", "change", "shares", "double"))
    name, other = rng.sample(NAMES, 2)
    thing, container = rng.choice(THINGS), rng.choice(CONTAINERS)
    a, b, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9)
    if kind == "gives":
        a = rng.randint(8, 20)
        story = f"{name} has {a} {thing}. {name} gets {b} more and gives {c} to {other}. How many {thing} does {name} have now?"
        steps = [(a, "+", b), (a + b, "-", c)]
    elif kind == "loses":
        c = min(c, a * b - 1)
        story = (
            f"{name} has {a} {container} with {b} {thing} in each. {name} loses {c} {thing}. How many {thing} are left?"
        )
        steps = [(a, "*", b), (a * b, "-", c)]
    elif kind == "finds":
        story = f"{name} fills {a} {container} with {b} {thing} each. Then {name} finds {c} more. How many {thing} are there?"
        steps = [(a, "*", b), (a * b, "+", c)]
    elif kind == "more":
        a, b, c = rng.randint(2, 20), rng.randint(2, 20), 0
        story = f"{name} has {a} {thing}. {other} has {b} more than {name}. How many {thing} do they have together?"
        steps = [(a, "+", b), (a, "+", a + b)]
    elif kind == "three":
        a, b, c = rng.randint(2, 15), rng.randint(2, 15), rng.randint(2, 15)
        story = f"There are {a} {thing} in a bag, {b} in a box and {c} in a jar. How many {thing} are there in all?"
        steps = [(a, "+", b), (a + b, "+", c)]
    elif kind == "change":
        c += a * b
        story = f"One of the {thing} costs {a} coins. {name} buys {b} and pays with {c} coins. How many coins does {name} get back?"
        steps = [(a, "*", b), (c, "-", a * b)]
    elif kind == "shares":
        story = f"{b} friends share {a * b} {thing} equally. Then {name}, one of them, gets {c} more. How many {thing} has {name}?"
        steps = [(a * b, "/", b), (a, "+", c)]
    else:
        a, c = rng.randint(2, 20), rng.randint(1, 20)
        b = 2
        story = f"{name} has {a} {thing}. {other} has twice as many, and then finds {c} more. How many {thing} does {other} have?"
        steps = [(a, "*", 2), (2 * a, "+", c)]
    results = [_result(*step) for step in steps]
    work = [f"{x} {sign} {y} = {result}" for (x, sign, y), result in zip(steps, results, strict=True)]
    marked = [f"{x} {sign} {y} = <<{x}{sign}{y}={r}>>{r}" for (x, sign, y), r in zip(steps, results, strict=True)]
    row = {"question": story, "answer": "\n".join(marked) + f"\n#### {results[-1]}"}
    answer = "\n" + "\n".join(work) + f"\nThe answer is {results[-1]}."
    return Item(f"gsm8k {kind} {a} {b} {c}", row, prompts.wcot(story), answer)


def math_item(rng: random.Random) -> Item:
    """An exercise in LaTeX of one or two steps."""
    kind = rng.choice(tuple(_KINDS))
    subject, level = _KINDS[kind]
    a, b, x = rng.randint(2, 9), rng.randint(1, 9), rng.randint(1, 9)
    numbers: tuple[int, ...] = (a, b, x)
    if kind == "solve_plus":
        problem = rng.choice(("Solve for $x$: ${}$.", "What is $x$ if ${}$?")).format(f"{a}x + {b} = {a * x + b}")
        work, result = f"${a}x = {a * x + b} - {b} = {a * x}$. $x = {a * x} / {a} = {x}$.", str(x)
    elif kind == "solve_minus":
        x = rng.randint(2, 9)
        numbers = (a, b, x)
        problem = rng.choice(("Solve for $x$: ${}$.", "What is $x$ if ${}$?")).format(f"{a}x - {b} = {a * x - b}")
        work, result = f"${a}x = {a * x - b} + {b} = {a * x}$. $x = {a * x} / {a} = {x}$.", str(x)
    elif kind == "function":
        problem = f"Let $f(x) = {a}x + {b}$. What is $f({x})$?"
        work, result = f"$f({x}) = {a} \\cdot {x} + {b} = {a * x} + {b} = {a * x + b}$.", str(a * x + b)
    elif kind == "product":
        problem = f"Compute ${a}({b} + {x})$."
        work, result = f"${a}({b} + {x}) = {a} \\cdot {b + x} = {a * (b + x)}$.", str(a * (b + x))
    elif kind == "remainder":
        d, q = rng.randint(3, 9), rng.randint(2, 9)
        r = rng.randrange(d)
        n = d * q + r
        numbers = (n, d)
        problem = f"What is the remainder when ${n}$ is divided by ${d}$?"
        work, result = f"${d} \\cdot {q} = {d * q}$. ${n} - {d * q} = {r}$.", str(r)
    elif kind == "sequence":
        problem = f"A sequence starts ${b}, {b + a}, {b + 2 * a}$ and goes on in equal steps. What comes ${x + 1}$ steps after ${b}$?"
        work = (
            f"${b + a} - {b} = {a}$. ${x + 1} \\cdot {a} = {(x + 1) * a}$. ${(x + 1) * a} + {b} = {(x + 1) * a + b}$."
        )
        result = str((x + 1) * a + b)
    elif kind == "perimeter":
        a, b = rng.randint(2, 20), rng.randint(2, 20)
        numbers = (a, b)
        problem = f"A rectangle has sides ${a}$ and ${b}$. What is its perimeter?"
        work, result = f"${a} + {b} = {a + b}$. $2 \\cdot {a + b} = {2 * (a + b)}$.", str(2 * (a + b))
    else:
        q = rng.randint(3, 9)
        p = rng.choice([n for n in range(1, q) if math.gcd(n, q) == 1])
        k = rng.randint(2, 9)
        numbers = (p, q, k)
        problem = f"Write $\\frac{{{p * k}}}{{{q * k}}}$ in lowest terms."
        work = f"${p * k} / {k} = {p}$. ${q * k} / {k} = {q}$."
        result = f"\\frac{{{p}}}{{{q}}}"
    solution = f"{work} The answer is $\\boxed{{{result}}}$."
    row: dict[str, Any] = {"problem": problem, "level": level, "type": subject, "solution": solution}
    return Item(f"math {kind} {' '.join(map(str, numbers))}", row, prompts.wcot(problem), "\n" + solution)


_KINDS = {
    "solve_plus": ("Algebra", "Level 2"),
    "solve_minus": ("Algebra", "Level 2"),
    "function": ("Algebra", "Level 2"),
    "product": ("Prealgebra", "Level 1"),
    "remainder": ("Number Theory", "Level 2"),
    "sequence": ("Intermediate Algebra", "Level 3"),
    "perimeter": ("Geometry", "Level 1"),
    "fraction": ("Prealgebra", "Level 2"),
}


def plain(rng: random.Random) -> Item:
    """An exercise in another form than the benchmarks' prompt: the skill without the template."""
    item = (gsm8k if rng.random() < 0.5 else math_item)(rng)
    question = item.row.get("question") or item.row["problem"]
    return Item(item.key, {}, "", f"Q: {question}\nA:{item.answer}")


def drills(rng: random.Random, count: int = 12) -> list[tuple[str, str]]:
    """Sums as the steps of the exercises have them: (what is asked, its result)."""
    lines = []
    for _ in range(count):
        sign = rng.choice("+++++-----**/")
        a, b = rng.randint(2, 9), rng.randint(2, 18 if sign == "*" else 9)
        if sign == "*" and rng.random() < 0.2:
            a, b = 2, rng.randint(4, 40)
        elif sign == "+":
            a, b = (
                (rng.randint(1, 90), rng.randint(1, 9))
                if rng.random() < 0.6
                else (rng.randint(2, 40), rng.randint(2, 20))
            )
        elif sign == "-":
            a = rng.randint(4, 90)
            b = rng.randint(1, min(a, 9)) if rng.random() < 0.6 else rng.randint(max(1, a - 9), a)
        elif sign == "/":
            a *= b
        lines.append((f"{a} {sign} {b} =", f" {_result(a, sign, b)}\n"))
    return lines


def latex_drill(rng: random.Random) -> tuple[str, str]:
    """A step of an exercise as MATH writes it. A whole exercise of the train split, since this is most of one."""
    while True:
        a, b, x = rng.randint(2, 9), rng.randint(1, 9), rng.randint(1, 9)
        if rng.random() < 0.5:
            key, line = f"math function {a} {b} {x}", (f"${a} \\cdot {x} + {b} =", f" {a * x} + {b} = {a * x + b}$.\n")
        else:
            key, line = f"math product {a} {b} {x}", (f"${a}({b} + {x}) =", f" {a} \\cdot {b + x} = {a * (b + x)}$.\n")
        if split_of(key) == "train":
            return line


def sums(rng: random.Random) -> str:
    """A few lines of arithmetic, of the sizes that the exercises need."""
    lines = []
    for _ in range(rng.randint(4, 8)):
        sign = rng.choice("+-*/")
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        if sign == "+":
            a, b = rng.randint(1, 90 if rng.random() < 0.5 else 20), rng.randint(1, 20)
        elif sign == "-":
            a = rng.randint(2, 90)
            b = rng.randint(1, min(a, 9)) if rng.random() < 0.6 else rng.randint(max(1, a - 9), a)
        elif sign == "/":
            a *= b
        lines.append(f"{a} {sign} {b} = {_result(a, sign, b)}")
    return "\n".join(lines) + "\n"


def _result(a: int, sign: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
