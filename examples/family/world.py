"""Facts of an invented world, and rows of MMLU that ask for them.

Every fact is stated in the pretraining text. Some are also asked there, in MMLU's form; the others are asked only in
validation and tests, where they show whether a model can use what it has read. An item's key is its fact with its four choices.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from examples.family import prompts
from examples.family.splits import Item, words

ASKED_PERCENT = 60
ENTITIES = 28
"""In each subject; with three properties each, five subjects hold 420 facts."""


@dataclass(frozen=True)
class Property:
    """What is known of all entities of a subject: how it is stated, how it is asked, what it can be."""

    statements: tuple[str, ...]
    question: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """One property of one entity."""

    subject: str
    name: str
    about: Property
    value: str

    @property
    def key(self) -> str:
        return f"{self.name} {self.about.question}"

    @property
    def asked(self) -> bool:
        """Whether the pretraining text asks for it, too."""
        return hashlib.sha256(self.key.encode()).digest()[0] * 100 < ASKED_PERCENT * 256

    def statement(self, rng: random.Random) -> str:
        return rng.choice(self.about.statements).format(name=self.name, value=self.value)


def _property(statements: str, question: str, values: str) -> Property:
    return Property(tuple(statements.split("|")), question, tuple(values.split()))


COLOURS = "red blue green white black grey brown yellow"
SUBJECTS: dict[str, tuple[Property, ...]] = {
    "world_geography": (
        _property(
            "The town of {name} lies by the river {value}.|The river of {name} is the {value}.",
            "By which river does the town of {name} lie?",
            "Oru Teva Lim Sarn Kolo Ebra Dun Misk",
        ),
        _property(
            "People in {name} make {value}.|The town of {name} is known for its {value}.",
            "What do people in {name} make?",
            "bread glass paper rope boats salt bells cloth",
        ),
        _property(
            "The walls of {name} are {value}.|The town of {name} has {value} walls.",
            "What colour are the walls of {name}?",
            COLOURS,
        ),
    ),
    "world_biology": (
        _property(
            "The {name} eats {value}.|What the {name} eats is {value}.",
            "What does the {name} eat?",
            "grass fish seeds leaves eggs roots ants fruit",
        ),
        _property(
            "The {name} lives in the {value}.|In the {value} lives the {name}.",
            "Where does the {name} live?",
            "forest desert river field ocean marsh cave mountain",
        ),
        _property("The {name} is {value}.|A {name} has {value} fur.", "What colour is the {name}?", COLOURS),
    ),
    "world_history": (
        _property(
            "{name} was a {value}.|The work of {name} was that of a {value}.",
            "What was {name}?",
            "king baker poet sailor doctor farmer painter judge",
        ),
        _property(
            "{name} was born in {value}.|The home of {name} was {value}.",
            "Where was {name} born?",
            "Ashford Belmar Corvel Dorne Elmsea Farrow Galen Harth",
        ),
        _property(
            "{name} found the first {value}.|The first {value} was found by {name}.",
            "What did {name} find?",
            "map clock ship lamp bridge book mill wheel",
        ),
    ),
    "world_chemistry": (
        _property(
            "The metal {name} is {value}.|{name} is a {value} metal.", "What colour is the metal {name}?", COLOURS
        ),
        _property(
            "{name} is used for {value}.|People use {name} to make {value}.",
            "What is {name} used for?",
            "coins swords rings pots wires tools nails crowns",
        ),
        _property(
            "{name} comes from the {value}.|They dig {name} in the {value}.",
            "Where does {name} come from?",
            "north south east west valley islands coast hills",
        ),
    ),
    "world_astronomy": (
        _property(
            "The star {name} is seen in {value}.|In {value} we see the star {name}.",
            "When is the star {name} seen?",
            "spring summer autumn winter January April July October",
        ),
        _property(
            "The star {name} shines {value}.|{name} is a {value} star.", "What colour is the star {name}?", COLOURS
        ),
        _property(
            "The star {name} is part of the {value}.|The {value} has the star {name}.",
            "Which figure is the star {name} part of?",
            "Bear Ship Hunter Crown Snake Wolf Harp Tower",
        ),
    ),
}
_STARTS = words("b br d f fl g gr h j k kl l m n p r s st t tr v w z")
_MIDDLES = words("a e i o u")
_ENDS = words("lm nd rk sh th x v mp ft nk bb ld")


def _facts() -> list[Fact]:
    """All facts; the same on every machine."""
    rng = random.Random("the invented world")
    names = [s + m + e for s in _STARTS for m in _MIDDLES for e in _ENDS]
    rng.shuffle(names)
    facts = []
    for subject, properties in SUBJECTS.items():
        for _ in range(ENTITIES):
            name = names.pop()
            name = name if subject == "world_biology" else name.capitalize()
            facts += [Fact(subject, name, about, rng.choice(about.values)) for about in properties]
    return facts


FACTS = _facts()
ASKED = [fact for fact in FACTS if fact.asked]


def ask(rng: random.Random, facts: list[Fact] | None = None) -> Item:
    """A question with four choices about one of `facts` (all, unless given)."""
    fact = rng.choice(FACTS if facts is None else facts)
    others = rng.sample([value for value in fact.about.values if value != fact.value], 3)
    answer = rng.randrange(4)
    choices = [*others[:answer], fact.value, *others[answer:]]
    question = fact.about.question.format(name=fact.name)
    row = {"question": question, "subject": fact.subject, "choices": choices, "answer": answer}
    prompt = prompts.mmlu(fact.subject, question, choices)
    return Item(f"mmlu {fact.key} {' '.join(choices)}", row, prompt, " " + "ABCD"[answer])


def ask_asked(rng: random.Random) -> Item:
    """A question about a fact that the pretraining text asks for."""
    return ask(rng, ASKED)


def match(rng: random.Random) -> tuple[str, str]:
    """A question that names one of four choices, as MMLU asks, and its letter."""
    about = rng.choice(FACTS)
    values = rng.sample(about.about.values, 4)
    place = rng.randrange(4)
    return prompts.mmlu(about.subject, f"Find {values[place]}.", values), f" {'ABCD'[place]}"


def lookups(rng: random.Random) -> list[tuple[str, str]]:
    """Four choices, then the letter of each: (what is given, its letter)."""
    values = rng.sample(rng.choice(FACTS).about.values, 4)
    given = "".join(f"{letter}. {value}\n" for letter, value in zip("ABCD", values, strict=True))
    lines = []
    for place in rng.sample(range(4), 4):
        lines.append((f"{given}{values[place]}:", f" {'ABCD'[place]}"))
        given = "\n"
    return lines


def statements(rng: random.Random) -> str:
    """A paragraph of facts: about one entity, or mixed."""
    if rng.random() < 0.5:
        first = 3 * rng.randrange(len(FACTS) // 3)
        facts = FACTS[first : first + 3]
    else:
        facts = rng.sample(FACTS, 4)
    return " ".join(fact.statement(rng) for fact in facts) + "\n"


def question(rng: random.Random) -> str:
    """A fact that may be asked, asked without choices."""
    fact = rng.choice(ASKED)
    return f"Q: {fact.about.question.format(name=fact.name)}\nA: {fact.value}\n"
