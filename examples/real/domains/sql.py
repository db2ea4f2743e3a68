"""SQL on invented schemas: two tables in the prompt, a question, and the query that answers it.

The content of a document is its schema: no two splits share one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from examples.family.splits import words
from examples.real.domains.documents import Document

OWNERS = {
    "owner": ("city", "country", "phone"),
    "farmer": ("village", "region", "email"),
    "club": ("town", "league", "coach"),
    "museum": ("city", "country", "director"),
    "company": ("country", "sector", "address"),
    "teacher": ("school", "subject", "email"),
    "captain": ("harbour", "rank", "nation"),
    "library": ("district", "city", "manager"),
}
THINGS = {
    "boat": (("length", "year", "speed"), ("colour", "type")),
    "horse": (("age", "weight", "wins"), ("colour", "breed")),
    "painting": (("year", "height", "price"), ("style", "medium")),
    "bridge": (("span", "height", "cost"), ("material", "river")),
    "course": (("credits", "hours", "fee"), ("topic", "level")),
    "tractor": (("power", "year", "price"), ("brand", "fuel")),
    "player": (("age", "goals", "salary"), ("position", "foot")),
    "novel": (("pages", "year", "copies"), ("genre", "language")),
    "robot": (("weight", "battery", "price"), ("model", "task")),
    "orchard": (("area", "trees", "yield"), ("fruit", "soil")),
    "machine": (("power", "hours", "cost"), ("model", "status")),
    "garden": (("area", "plants", "visitors"), ("style", "climate")),
}
VALUES = words("red blue north south modern classic oak steel early late open small large basic rapid calm")


@dataclass(frozen=True)
class Schema:
    """Two tables: things, each of which belongs to an owner.

    Attributes:
        thing, owner: names of one row of each.
        numbers, texts: columns of the things.
        places: columns of the owners.
    """

    thing: str
    owner: str
    numbers: tuple[str, ...]
    texts: tuple[str, ...]
    places: tuple[str, ...]

    @property
    def things(self) -> str:
        """The table of the things."""
        return plural(self.thing)

    @property
    def owners(self) -> str:
        """The table of the owners."""
        return plural(self.owner)

    def __str__(self) -> str:
        columns = ", ".join(("id", "name", *self.texts, *self.numbers, f"{self.owner}_id"))
        return f"{self.things}({columns})\n{self.owners}({', '.join(('id', 'name', *self.places))})"

    def join(self, thing: str = "t", owner: str = "o") -> str:
        """The FROM part that joins both."""
        return f"{self.things} {thing} JOIN {self.owners} {owner} ON {thing}.{self.owner}_id = {owner}.id"


def plural(noun: str) -> str:
    """Of a table's row: its name."""
    return noun[:-1] + "ies" if noun.endswith("y") else noun + "s"


def draw_schema(rng: random.Random) -> Schema:
    """A random schema."""
    thing, owner = rng.choice(tuple(THINGS)), rng.choice(tuple(OWNERS))
    numbers, texts = THINGS[thing]
    return Schema(
        thing,
        owner,
        tuple(rng.sample(numbers, 2)),
        tuple(rng.sample(texts, rng.choice((1, 2)))),
        tuple(rng.sample(OWNERS[owner], 2)),
    )


def query(rng: random.Random) -> Document:
    """A question on a schema, with its query."""
    s = draw_schema(rng)
    number, other = rng.sample(s.numbers, 2)
    text, place, value = rng.choice(s.texts), rng.choice(s.places), rng.choice(VALUES)
    n, k = rng.randint(2, 90) * rng.choice((1, 5, 10)), rng.randint(2, 9)
    word, sign = rng.choice((("above", ">"), ("below", "<"), ("at least", ">="), ("at most", "<=")))
    order, direction = rng.choice((("highest", "DESC"), ("lowest", "ASC")))
    made, call = rng.choice((("average", "AVG"), ("total", "SUM"), ("highest", "MAX"), ("lowest", "MIN")))
    ask = rng.choice(("List the names of", "Show the names of", "Give the names of"))
    questions = (
        (f"{ask} all {s.things} whose {number} is {word} {n}.",
         f"SELECT name FROM {s.things} WHERE {number} {sign} {n} ORDER BY name;"),
        (f"How many {s.things} have the {text} '{value}'?",
         f"SELECT COUNT(*) AS n FROM {s.things} WHERE {text} = '{value}';"),
        (f"What is the {made} {number} of the {s.things} for each {text}?",
         f"SELECT {text}, {call}({number}) AS {made}_{number} FROM {s.things} GROUP BY {text} ORDER BY {text};"),
        (f"{ask} the {k} {s.things} with the {order} {number}.",
         f"SELECT name FROM {s.things} ORDER BY {number} {direction} LIMIT {k};"),
        (f"{ask} all {s.things} that belong to a {s.owner} with the {place} '{value}'.",
         f"SELECT t.name FROM {s.join()} WHERE o.{place} = '{value}' ORDER BY t.name;"),
        (f"Which {s.owners} have more than {k} {s.things}? Give the name and the number.",
         f"SELECT o.name, COUNT(*) AS n FROM {s.join()} GROUP BY o.id HAVING COUNT(*) > {k} ORDER BY n DESC;"),
        (f"What is the {made} {number} of the {s.things} of each {s.owner}?",
         f"SELECT o.name, {call}(t.{number}) AS {made}_{number} FROM {s.join()} GROUP BY o.id ORDER BY o.name;"),
        (f"{ask} the {s.things} whose {number} is above the average {number}.",
         f"SELECT name FROM {s.things} WHERE {number} > (SELECT AVG({number}) FROM {s.things}) ORDER BY name;"),
        (f"Which {s.owners} have no {s.things}?",
         f"SELECT o.name FROM {s.owners} o LEFT JOIN {s.things} t ON t.{s.owner}_id = o.id WHERE t.id IS NULL ORDER BY o.name;"),
        (f"{ask} all {s.things} with the {text} '{value}' and a {number} between {n} and {n + 10 * k}.",
         f"SELECT name FROM {s.things} WHERE {text} = '{value}' AND {number} BETWEEN {n} AND {n + 10 * k} ORDER BY name;"),
        (f"For each {place}, what is the {made} {other} of the {s.things} there?",
         f"SELECT o.{place}, {call}(t.{other}) AS {made}_{other} FROM {s.join()} GROUP BY o.{place} ORDER BY o.{place};"),
        (f"What different kinds of {text} do the {s.things} with a {number} {word} {n} have?",
         f"SELECT DISTINCT {text} FROM {s.things} WHERE {number} {sign} {n} ORDER BY {text};"),
    )  # fmt: skip
    question, answer = rng.choice(questions)
    return Document(f"sql {s}", f"{s}\n\nWrite a query in SQL. {question}", answer)
