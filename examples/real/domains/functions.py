"""Python functions with docstrings: the prompt has the head, the answer is the body.

A function goes through a list, a text or a dictionary: which elements, what is done to each, and what is made of them. The content
of a document is the body, so that no function that is tested is in training text, under whatever name.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from examples.family.splits import words
from examples.real.domains.documents import Document

VERBS = words("collect gather compute find build make derive work_out summarise select")
NOUNS = words("result values report output data entries figures answer overview items")


@dataclass(frozen=True)
class Source:
    """What a function goes through.

    Attributes:
        parameter, kind: name of the parameter, and its type.
        loop: head of the loop, of which `element` is one turn's variable.
        plural: how a docstring calls the elements.
        tests: (words, condition); `{k}` is a number, `{c}` a letter.
        changes: (words, expression); "" for the element itself.
    """

    parameter: str
    kind: str
    loop: str
    element: str
    plural: str
    tests: tuple[tuple[str, str], ...]
    changes: tuple[tuple[str, str], ...]


NUMBERS = Source(
    "numbers", "list[int]", "for number in numbers:", "number", "numbers",
    (("that are even", "number % 2 == 0"), ("that are odd", "number % 2 == 1"), ("greater than {k}", "number > {k}"),
     ("less than {k}", "number < {k}"), ("divisible by {k}", "number % {k} == 0"), ("that are negative", "number < 0"),
     ("whose square is greater than {k}", "number * number > {k}"), ("that end in {k}", "abs(number) % 10 == {k}")),
    (("", "number"), ("the squares of", "number * number"), ("the absolute values of", "abs(number)"),
     ("{k} times", "{k} * number"), ("the halves, rounded down, of", "number // 2"), ("the digit sums of", "sum(int(digit) for digit in str(abs(number)))")),
)  # fmt: skip
WORDS = Source(
    "text", "str", "for word in text.split():", "word", "words",
    (("longer than {k} letters", "len(word) > {k}"), ("shorter than {k} letters", "len(word) < {k}"),
     ("that start with '{c}'", "word.startswith('{c}')"), ("that end with '{c}'", "word.endswith('{c}')"),
     ("that contain '{c}'", "'{c}' in word"), ("that are capitalised", "word[0].isupper()"),
     ("that are palindromes", "word == word[::-1]"), ("that hold a digit", "any(letter.isdigit() for letter in word)")),
    (("", "word"), ("the lengths of", "len(word)"), ("the capitals of", "word.upper()"), ("the first letters of", "word[0]"),
     ("the reversals of", "word[::-1]"), ("the number of vowels in each of", "sum(letter in 'aeiou' for letter in word)")),
)  # fmt: skip
PRICES = Source(
    "prices", "dict[str, int]", "for name, price in prices.items():", "name", "articles",
    (("that cost more than {k}", "price > {k}"), ("that cost at most {k}", "price <= {k}"), ("whose price is even", "price % 2 == 0"),
     ("whose name starts with '{c}'", "name.startswith('{c}')"), ("whose name is longer than {k} letters", "len(name) > {k}")),
    (("the names of", "name"), ("the prices of", "price"), ("the prices, raised by {k}, of", "price + {k}"),
     ("the lengths of the names of", "len(name)"), ("the names in capitals of", "name.upper()")),
)  # fmt: skip
TEXTUAL = ("word", "name", "word.upper()", "word[0]", "word[::-1]", "name.upper()")
"""Expressions whose value is a text."""
LETTERS = "abcdefghilmnoprstw"


def function(rng: random.Random) -> Document:
    """The head of a function, with its body."""
    source = rng.choice((NUMBERS, WORDS, PRICES))
    (which, test), (change, value) = rng.choice(source.tests), rng.choice(source.changes)
    letter, k = rng.choice(LETTERS), str(rng.randint(2, 9))
    m = str(rng.randint(2, 9))
    which, test = (part.replace("{k}", k).replace("{c}", letter) for part in (which, test))
    change, value = (part.replace("{k}", m) for part in (change, value))
    elements = f"{change} the {source.plural} {which}".strip()
    returned, sentence, body = rng.choice(_bodies(source, test, value, elements, text=value in TEXTUAL))
    name = f"{rng.choice(VERBS)}_{rng.choice(NOUNS)}"
    head = f'def {name}({source.parameter}: {source.kind}) -> {returned}:\n    """Return {sentence}."""'
    return Document(f"functions {body}", f"Complete this function.\n\n{head}", body)


def _bodies(source: Source, test: str, value: str, elements: str, *, text: bool) -> list[tuple[str, str, str]]:
    """(returned type, sentence, body) of everything that can be made of the elements."""
    kind = "str" if text else "int"
    start = f"    {source.loop}\n        if {test}:\n"
    bodies = [
        (f"list[{kind}]", f"a list of {elements}", f"    found = []\n{start}            found.append({value})\n    return found"),
        ("int", f"how many there are of {elements}", f"    count = 0\n{start}            count += 1\n    return count"),
        (f"set[{kind}]", f"the set of {elements}", f"    found = set()\n{start}            found.add({value})\n    return found"),
        (f"dict[{kind}, int]", f"how often each occurs of {elements}",
         f"    counts = {{}}\n{start}            counts[{value}] = counts.get({value}, 0) + 1\n    return counts"),
        (f"{kind} | None", f"the first of {elements}, or None", f"{start}            return {value}\n    return None"),
        (f"{kind} | None", f"the last of {elements}, or None",
         f"    last = None\n{start}            last = {value}\n    return last"),
    ]  # fmt: skip
    if text:
        bodies.append(
            ("str", f"{elements}, joined by commas", f"    parts = []\n{start}            parts.append({value})\n    return ', '.join(parts)")
        )  # fmt: skip
    else:
        bodies += [
            ("int", f"the sum of {elements}", f"    total = 0\n{start}            total += {value}\n    return total"),
            ("int | None", f"the largest of {elements}, or None",
             f"    best = None\n{start}            if best is None or {value} > best:\n                best = {value}\n    return best"),
        ]  # fmt: skip
    return bodies
