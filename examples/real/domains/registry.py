"""The domains by name."""

from examples.real.domains.documents import Generator
from examples.real.domains.functions import function
from examples.real.domains.maths import problem
from examples.real.domains.sql import query

DOMAINS: dict[str, Generator] = {"maths": problem, "sql": query, "functions": function}
