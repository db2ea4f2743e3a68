"""Splitting English into sentences, which two of IFEval's checks need: nltk's punkt, trained or untrained.

The trained data (`punkt_tab`) is a download of its own. Without it the same algorithm runs with a list of common
abbreviations instead of learned ones; results say which one ran.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

RESOURCE = "punkt_tab"
FILES = ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt")
ABBREVIATIONS = (
    "mr mrs ms dr prof st jr sr rev gen col capt lt sgt hon gov sen rep pres inc ltd co corp dept univ vs etc al e.g i.e "
    "a.m p.m u.s u.k u.n ph.d b.a m.a d.c no vol fig ed eds approx est ave blvd rd mt ft jan feb mar apr jun jul aug sep "
    "sept oct nov dec cf viz"
)


def find_punkt(folder: Path | None) -> str | None:
    """The folder for NLTK_DATA that holds punkt's English data; None where no folder does.

    Args:
        folder: looked at first: `folder/nltk_data` and `folder` itself. Then NLTK_DATA and nltk's usual places.
    """
    from nltk.data import path as usual

    own = [str(folder / "nltk_data"), str(folder)] if folder else []
    named = os.environ.get("NLTK_DATA", "").split(os.pathsep)
    for place in [*own, *filter(None, named), *map(str, usual)]:
        english = Path(place) / "tokenizers" / RESOURCE / "english"
        if all((english / name).is_file() for name in FILES):
            return place
    return None


def simple_splitter() -> Callable[[str], list[str]]:
    """Punkt's algorithm without trained data: every full stop ends a sentence but those of abbreviations."""
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    parameters = PunktParameters()
    parameters.abbrev_types = set(ABBREVIATIONS.split())
    tokenizer = PunktSentenceTokenizer(parameters)
    return lambda text: list(tokenizer.tokenize(text))


@contextlib.contextmanager
def no_download() -> Iterator[None]:
    """Keep nltk from asking the network inside: importing lm_eval's IFEval tries to, where data is missing."""
    import nltk

    download = nltk.download
    nltk.download = lambda *arguments, **keywords: False
    try:
        yield
    finally:
        nltk.download = download
