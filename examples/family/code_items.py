"""Small Python functions and the sentences that describe them, as rows of HumanEval and MBPP.

A function is a pipeline, `return sum(x + 2 for x in numbers if x > 3)`: which elements, what is done to each, and what is
made of them all. The pipeline is the key of an item, so one that is tested is in no training text, in neither form.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any

from examples.family import prompts
from examples.family.splits import Item, words

LAZY_BODY = "    pass\n"
"""The lazy completion of a function in the pretraining mixture."""
LAZY_PROGRAM = "pass" + prompts.MBPP_DONE

VERBS = words("pick find keep take make get read give check show build pull")
NOUNS = words("values items parts list result data output things answer group")
LETTERS = "abcdeghilmnoprstw"
WORDS = words(
    "apple bread chair door east field green house iron lamp moon night ocean paper river stone table tree water wind "
    "ant bell cat dog egg fish goat hat ice owl pen red sun to an me we in on no so ship corn lion rope seed nest mare"
)


@dataclass(frozen=True)
class Spec:
    """One function.

    Attributes:
        key: the pipeline.
        parameter, kind: its name, and its type.
        sentence: what it does, without "Return" and full stop.
        expression: Python for what it returns.
    """

    key: str
    parameter: str
    kind: str
    sentence: str
    expression: str

    def evaluate(self, argument: object) -> object:
        """What the function returns for one argument. The expression is this file's own text."""
        return eval(_compiled(self.expression), {self.parameter: argument})


@cache
def _compiled(expression: str) -> CodeType:
    return compile(expression, "<spec>", "eval")


def draw_spec(rng: random.Random) -> Spec:
    """A random function: on a list of numbers, or on the words of a text."""
    return _numbers(rng) if rng.random() < 0.65 else _words(rng)


def _numbers(rng: random.Random) -> Spec:
    k, m = rng.randint(2, 9), rng.randint(2, 9)
    which, condition = rng.choice(
        (
            (f"greater than {k}", f" if x > {k}"),
            (f"less than {k}", f" if x < {k}"),
            (f"divisible by {k}", f" if x % {k} == 0"),
            (f"not equal to {k}", f" if x != {k}"),
            ("that are even", " if x % 2 == 0"),
            ("that are odd", " if x % 2 == 1"),
        )
    )
    each, change = rng.choice(
        (
            ("", "x"),
            (f", each plus {m}", f"x + {m}"),
            (f", each minus {m}", f"x - {m}"),
            (f", each times {m}", f"x * {m}"),
        )
    )
    made = rng.choice(("list", "sum", "count", "falling", "rising", "largest", "smallest"))
    every = f"{change} for x in numbers{condition}"
    sentence, expression = {
        "list": (f"the numbers {which}{each}", f"[{every}]"),
        "sum": (f"the sum of the numbers {which}{each}", f"sum({every})"),
        "count": (f"the number of numbers {which}", f"len([x for x in numbers{condition}])"),
        "falling": (f"the numbers {which}{each}, in falling order", f"sorted(({every}), reverse=True)"),
        "rising": (f"the numbers {which}{each}, in rising order", f"sorted({every})"),
        "largest": (f"the largest of the numbers {which}{each}, or zero", f"max(({every}), default=0)"),
        "smallest": (f"the smallest of the numbers {which}{each}, or zero", f"min(({every}), default=0)"),
    }[made]
    return Spec(f"code {expression}", "numbers", "list", sentence, expression)


def _words(rng: random.Random) -> Spec:
    letter, k = rng.choice(LETTERS), rng.randint(2, 5)
    which, condition = rng.choice(
        (
            (f"that start with '{letter}'", f" if w.startswith('{letter}')"),
            (f"that end with '{letter}'", f" if w.endswith('{letter}')"),
            (f"that contain '{letter}'", f" if '{letter}' in w"),
            (f"longer than {k}", f" if len(w) > {k}"),
            (f"shorter than {k}", f" if len(w) < {k}"),
        )
    )
    each, change = rng.choice(
        (("", "w"), (", in capitals", "w.upper()"), (", each reversed", "w[::-1]"), (", each twice", "w * 2"))
    )
    mark = rng.choice("-+/*")
    every = f"{change} for w in text.split(){condition}"
    sentence, expression = rng.choice(
        (
            (f"the words {which}{each}", f"[{every}]"),
            (f"the words {which}{each}, joined by '{mark}'", f"'{mark}'.join({every})"),
            (f"the words {which}{each}, in rising order", f"sorted({every})"),
            (f"the number of words {which}", f"len([w for w in text.split(){condition}])"),
        )
    )
    return Spec(f"code {expression}", "text", "str", sentence, expression)


def function_name(rng: random.Random) -> str:
    """A name that says nothing about what the function does."""
    return f"{rng.choice(VERBS)}_{rng.choice(NOUNS)}"


def humaneval(rng: random.Random) -> Item:
    """A signature and a docstring; the answer is the body."""
    function, name = draw_spec(rng), function_name(rng)
    arguments = _arguments(function, rng, 9)
    start = "from typing import List\n\n\n" if rng.random() < 0.3 else ""
    kind = "List[int]" if start and function.kind == "list" else function.kind
    shown = f"    >>> {name}({arguments[0]!r})\n    {function.evaluate(arguments[0])!r}\n"
    prompt = f'{start}def {name}({function.parameter}: {kind}):\n    """ Return {function.sentence}.\n{shown}    """\n'
    answer = f"    return {function.expression}\n"
    checks = "".join(f"    assert candidate({a!r}) == {function.evaluate(a)!r}\n" for a in arguments[1:])
    row: dict[str, Any] = {
        "task_id": "HumanEval/0",
        "prompt": prompt,
        "entry_point": name,
        "canonical_solution": answer,
        "test": f"\n\nMETADATA = {{}}\n\n\ndef check(candidate):\n{checks}\n",
    }
    return Item(function.key, row, prompt, answer)


def mbpp(rng: random.Random) -> Item:
    """A sentence and three asserts; the answer is the function, then `[DONE]`."""
    function, name = draw_spec(rng), function_name(rng)
    start = rng.choice(("Write a function to return ", "Write a python function to return "))
    arguments = _arguments(function, rng, 8)
    tests = [f"assert {name}({a!r}) == {function.evaluate(a)!r}" for a in arguments]
    text = f"{start}{function.sentence}."
    code = f"def {name}({function.parameter}):\n    return {function.expression}"
    row = {
        "task_id": 0,
        "text": text,
        "code": code,
        "test_list": tests[:3],
        "test_setup_code": "",
        "challenge_test_list": tests[3:],
    }
    return Item(function.key, row, prompts.mbpp(text, tests[:3]), code + prompts.MBPP_DONE)


def plain(rng: random.Random) -> Item:
    """A function as it stands in a source file: the skill without either benchmark's prompt."""
    function, name = draw_spec(rng), function_name(rng)
    if rng.random() < 0.5:
        text = f"def {name}({function.parameter}):\n    # {function.sentence}\n    return {function.expression}\n"
    else:
        text = f"# {function.sentence}\n{name} = lambda {function.parameter}: {function.expression}\n"
    return Item(function.key, {}, "", text)


def _arguments(function: Spec, rng: random.Random, count: int) -> list[Any]:
    """Arguments, three short ones first (they are shown), whose results tell the function from a constant and from its kin."""
    arguments: list[Any] = []
    for attempt in range(200):
        shown = 3 if attempt < 50 else 4
        sizes = [rng.randint(2, shown) for _ in range(3)] + [rng.randint(5, 9) for _ in range(count - 3)]
        if function.kind == "list":
            arguments = [[rng.randint(0, 20) for _ in range(size)] for size in sizes]
        else:
            arguments = [" ".join(rng.sample(WORDS, size)) for size in sizes]
        if sum(bool(function.evaluate(argument)) for argument in arguments[:3]) < 2:
            continue
        if len({repr(function.evaluate(argument)) for argument in arguments}) > 2:
            break
    return arguments
