"""Regular expressions that come from recipes, flags and adapters: the syntax of `re`, under limits of time and memory."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from checkpoints.errors import ArgumentError, InputError, first_line
from checkpoints.strangers import STRANGERS, StrangersError

LONGEST_SHOWN = 200


class Pattern:
    """A regular expression.

    Args:
        where: whose it is, for messages.
        text: as `re` has it.
        error: what is raised; InputError where a checkpoint's file has it.

    Raises: ArgumentError (or `error`): it is none.
    """

    def __init__(self, where: str, text: str, error: type[InputError] = ArgumentError):
        self._where, self._text, self._error = where, text, error
        self._found: dict[str, bool] = {}
        try:
            STRANGERS.ask("check", pattern=text)
        except StrangersError as said:
            if said.kind == "Limit":
                raise self._too_slow(said) from None
            raise self._error(
                f"{where}: expected a regular expression, got {self._shown}: {first_line(said)}."
            ) from None

    @property
    def _shown(self) -> str:
        text = repr(self._text)
        return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}[...]"

    def _too_slow(self, said: StrangersError) -> InputError:
        return self._error(
            f"{self._where}: {self._shown}: {first_line(said)} on these names. Give a simpler expression."
        )

    def find(self, texts: Iterable[str]) -> list[bool]:
        """In which of the texts it is found. Raises ArgumentError where that takes too long."""
        texts = list(texts)
        new = [text for text in dict.fromkeys(texts) if text not in self._found]
        if new:
            try:
                matching = STRANGERS.ask("find", pattern=self._text, texts=new)
            except StrangersError as said:
                raise self._too_slow(said) from None
            self._found.update(zip(new, matching, strict=True))
        return [self._found[text] for text in texts]

    def found_in(self, text: str) -> bool:
        """Whether it is found in a text. Raises ArgumentError where that takes too long."""
        return self.find([text])[0]


@lru_cache(maxsize=16)
def pattern(where: str, text: str, error: type[InputError] = ArgumentError) -> Pattern:
    """A regular expression, which remembers the names it was looked for in. Arguments and errors as `Pattern`."""
    return Pattern(where, text, error)
