"""Word problems of two to four steps, with worked answers.

A problem is a chain: how many things there are at first, what happens to them, and what is asked. Its content is the chain with
its numbers; names, things and wording are decoration.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from examples.family.splits import words
from examples.real.domains.documents import Document

NAMES = words(
    "Ada Bruno Carla Dmitri Elif Farid Greta Hugo Ines Jonas Keiko Luca Maya Nils Olga Priya Rosa Sami Tomas Yara"
)
THINGS = {
    "collects": ("stamps", "shells", "postcards", "marbles", "coins", "badges"),
    "bakes": ("muffins", "rolls", "cookies", "pies", "bagels", "tarts"),
    "picks": ("apples", "plums", "lemons", "pumpkins", "peppers", "pears"),
    "builds": ("birdhouses", "kites", "lanterns", "stools", "toy boats", "baskets"),
}
PACKS = {"collects": "albums", "bakes": "trays", "picks": "crates", "builds": "pallets"}


@dataclass
class Chain:
    """A problem while it is built.

    Attributes:
        rng: draws.
        name, verb, thing: who does what with what.
        count: how many there are now; `unit` of them: the thing, or dollars.
        kinds: the steps with their numbers.
        story, work: sentences of the prompt, and lines of the answer.
    """

    rng: random.Random
    name: str
    verb: str
    thing: str
    count: int = 0
    unit: str = ""
    kinds: tuple[str, ...] = ()
    story: tuple[str, ...] = ()
    work: tuple[str, ...] = ()

    def step(self, kind: str, stories: tuple[str, ...], work: str, count: int) -> None:
        """Go one step on; `stories` are several wordings of what happens."""
        self.kinds += (kind,)
        self.story += (self.rng.choice(stories),)
        self.work += (work,)
        self.count = count


def start(chain: Chain) -> None:
    """How many things there are at first: a product of two or three numbers."""
    r, name, verb, thing, packs = chain.rng, chain.name, chain.verb, chain.thing, PACKS[chain.verb]
    chain.unit = thing
    a, b, c = r.randint(3, 12), r.randint(4, 15), r.randint(2, 30)
    kind = r.choice(("packs", "days", "weeks", "two"))
    if kind == "packs":
        stories = (f"{name} has {a} {packs} with {b} {thing} in each.", f"There are {b} {thing} in each of {name}'s {a} {packs}.")  # fmt: skip
        chain.step(f"packs {a} {b}", stories, f"{a} {packs} hold {a} * {b} = {a * b} {thing}.", a * b)
    elif kind == "days":
        stories = (f"{name} {verb} {b} {thing} a day for {a} days.", f"For {a} days, {name} {verb} {b} {thing} each day.")  # fmt: skip
        chain.step(f"days {a} {b}", stories, f"In {a} days {name} {verb} {a} * {b} = {a * b} {thing}.", a * b)
    elif kind == "weeks":
        a = r.randint(2, 4)
        stories = (f"{name} {verb} {b} {thing} every day for {a} weeks.", f"Every day for {a} weeks, {name} {verb} {b} {thing}.")  # fmt: skip
        work = f"{a} weeks are {a} * 7 = {7 * a} days.\n{name} {verb} {7 * a} * {b} = {7 * a * b} {thing}."
        chain.step(f"weeks {a} {b}", stories, work, 7 * a * b)
    else:
        total = b + b + c
        stories = (
            f"{name} {verb} {b} {thing} on Monday and {c} more than that on Tuesday.",
            f"On Monday {name} {verb} {b} {thing}. On Tuesday it is {c} more than on Monday.",
        )
        work = (
            f"On Tuesday {name} {verb} {b} + {c} = {b + c} {thing}.\nTogether that is {b} + {b + c} = {total} {thing}."
        )
        chain.step(f"two {b} {c}", stories, work, total)


def gives(chain: Chain) -> None:
    """Some go away."""
    n = chain.rng.randint(2, max(2, chain.count // 2))
    other = chain.rng.choice([name for name in NAMES if name != chain.name])
    stories = (f"{chain.name} gives {n} of them to {other}.", f"{other} gets {n} of them.", f"{n} of them break.")
    work = f"Then {chain.count} - {n} = {chain.count - n} {chain.unit} are left."
    chain.step(f"gives {n}", stories, work, chain.count - n)


def finds(chain: Chain) -> None:
    """Some come to them."""
    n = chain.rng.randint(3, 40)
    stories = (f"Then {chain.name} gets {n} more.", f"A neighbour adds {n} more.", f"Another {n} are bought.")
    chain.step(f"finds {n}", stories, f"Now there are {chain.count} + {n} = {chain.count + n} {chain.unit}.", chain.count + n)  # fmt: skip


def doubles(chain: Chain) -> None:
    """They become twice or three times as many."""
    n, word = chain.rng.choice(((2, "doubles"), (3, "triples")))
    stories = (f"By the end of the month the number {word}.", f"Over the summer, the number {word}.")
    chain.step(f"times {n}", stories, f"The number {word} to {chain.count} * {n} = {chain.count * n} {chain.unit}.", chain.count * n)  # fmt: skip


def part(chain: Chain) -> None:
    """A half, a third or a quarter goes away."""
    fitting = [(n, word) for n, word in ((2, "half"), (3, "a third"), (4, "a quarter"), (5, "a fifth")) if chain.count % n == 0]  # fmt: skip
    if not fitting:
        gives(chain)
        return
    n, word = chain.rng.choice(fitting)
    gone = chain.count // n
    stories = (f"{word.capitalize()} of them go to a school.", f"{chain.name} donates {word} of them.")
    work = f"{word.capitalize()} of {chain.count} is {chain.count} / {n} = {gone}.\nThen {chain.count} - {gone} = {chain.count - gone} {chain.unit} are left."  # fmt: skip
    chain.step(f"part {n}", stories, work, chain.count - gone)


def sells(chain: Chain) -> None:
    """All are sold; the unit becomes dollars, and there may be costs."""
    price = chain.rng.randint(2, 9)
    money = chain.count * price
    stories = (f"{chain.name} sells all that are left for ${price} each.", f"All of these are sold at ${price} apiece.")
    work = f"They bring {chain.count} * {price} = {money} dollars."
    chain.unit = "dollars"
    chain.step(f"sells {price}", stories, work, money)
    if chain.rng.random() < 0.5:
        cost = chain.rng.randint(5, max(5, money // 2))
        stories = (f"The stall costs ${cost}.", f"${cost} of it pays for the bus.")
        chain.step(f"cost {cost}", stories, f"After the cost, {money} - {cost} = {money - cost} dollars remain.", money - cost)  # fmt: skip


EVENTS: tuple[Callable[[Chain], None], ...] = (gives, finds, doubles, part)


def problem(rng: random.Random) -> Document:
    """A word problem with its worked answer."""
    verb = rng.choice(tuple(THINGS))
    chain = Chain(rng, rng.choice(NAMES), verb, rng.choice(THINGS[verb]))
    start(chain)
    for event in rng.sample(EVENTS, rng.choice((1, 1, 2))):
        event(chain)
    if rng.random() < 0.4:
        sells(chain)
    if chain.unit == "dollars":
        question = rng.choice((f"How much money does {chain.name} have in the end?", "How many dollars are left?"))
    else:
        question = rng.choice((f"How many {chain.thing} are there now?", f"How many {chain.thing} does that make?"))
    work = "\n".join((*chain.work, f"The answer is {chain.count}."))
    return Document(f"maths {'; '.join(chain.kinds)}", " ".join((*chain.story, question)), work)
