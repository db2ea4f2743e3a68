"""The documents of a recipe file: one says what is written; the others are merges under names, which it uses as models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from checkpoints.errors import ArgumentError
from checkpoints.location import ModelName
from checkpoints.problems import Problems
from merging.recipe import Recipe
from streaming.values import describe


class Documents:
    """The named merges of a file, each read when it is first used.

    Args:
        where: the file, for messages.
        contents: name -> what its document says.
        read: makes the recipe of a document: its place, its content; None where it is refused.
        problems: gets circles.
    """

    def __init__(
        self,
        where: str,
        contents: Mapping[str, Any],
        read: Callable[[str, Any], Recipe | None],
        problems: Problems,
    ):
        self._where, self._contents, self._read, self._problems = where, contents, read, problems
        self._reading: list[str] = []
        self.recipes: dict[str, Recipe | None] = {}
        """Of those that were used, each after those that it uses."""

    def __contains__(self, name: object) -> bool:
        return name in self._contents

    @property
    def unused(self) -> list[str]:
        """Names that nothing uses."""
        return [name for name in self._contents if name not in self.recipes]

    def model(self, name: str) -> ModelName | None:
        """A merge as a model; None where it is refused."""
        if name in self._reading:
            circle = " uses ".join([*self._reading[self._reading.index(name) :], name])
            self._problems.add(
                ArgumentError(f"{self._where}: {circle}: a merge cannot use itself. Leave one of them out.")
            )
            return None
        if name not in self.recipes:
            self._reading.append(name)
            recipe = self._read(name, self._contents[name])
            self._reading.pop()
            self.recipes[name] = recipe
        found = self.recipes[name]
        if found is None:
            return None
        from merging.named_merges import NamedMerge

        return ModelName(name, merged=NamedMerge(name, found))


def split(where: str, documents: Sequence[Any], problems: Problems) -> tuple[Any, dict[str, Any]]:
    """The document that says what is written, and the named ones: the last without a name, or the last of all."""
    if len(documents) == 1:
        (content,) = documents
        named = content.pop("merges", None) if isinstance(content, dict) else None
        if named is not None and not (isinstance(named, dict) and all(isinstance(name, str) for name in named)):
            problems.add(
                ArgumentError(f"{where}: merges: expected merges by name, got {describe(named)}. Give each its name.")
            )
            named = None
        return content, dict(named or {})
    wrong = [content for content in documents if not isinstance(content, dict)]
    if wrong:
        problems.add(
            ArgumentError(
                f"{where}: expected a recipe in each of its documents, got {describe(wrong[0])}. Mend the file."
            )
        )
        return None, {}
    nameless = [content for content in documents if content.get("name") is None]
    if len(nameless) > 1:
        problems.add(
            ArgumentError(
                f"{where}: expected at most one document without a name, the merge that is written, got {len(nameless)}. Name the others."
            )
        )
        return None, {}
    final = nameless[0] if nameless else documents[-1]
    named = {}
    for content in documents:
        if content is final:
            continue
        name = content.pop("name")
        if not isinstance(name, str) or not name.strip():
            problems.add(ArgumentError(f"{where}: name: expected text, got {describe(name)}. Name each merge."))
        elif name in named:
            problems.add(ArgumentError(f"{where}: two merges are named {name}. Give each a name of its own."))
        else:
            named[name] = content
    return final, named
