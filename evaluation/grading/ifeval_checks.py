"""IFEval's verifiers on one response, in a worker process: those of lm_eval 0.4.13, made repeatable.

langdetect draws random numbers; its seed is fixed, so that the same response always gets the same grade.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any


def check(row: Mapping[str, Any], response: str, punkt_folder: str | None) -> dict[str, list[bool]]:
    """Which instructions a response follows.

    Args:
        row: of IFEval's data.
        response: the model's text.
        punkt_folder: from `sentences.find_punkt`; None uses the simple splitter.

    Returns: `strict` and `loose`, each one boolean per instruction.
    """
    results = _verifiers(punkt_folder).process_results(dict(row), [response])
    return {
        "strict": [bool(followed) for followed in results["inst_level_strict_acc"]],
        "loose": [bool(followed) for followed in results["inst_level_loose_acc"]],
    }


@cache
def _verifiers(punkt_folder: str | None) -> ModuleType:
    """lm_eval's module, with its splitter set up."""
    import langdetect
    import nltk

    from evaluation.grading.sentences import no_download, simple_splitter

    langdetect.DetectorFactory.seed = 0
    if punkt_folder is not None:
        nltk.data.path.insert(0, punkt_folder)
    with no_download():
        from lm_eval.tasks.ifeval import instructions_util, utils
    if punkt_folder is None:
        split = simple_splitter()
        words = nltk.word_tokenize
        instructions_util.count_sentences = lambda text: len(split(text))
        # Whole lines: without sentences, only the last full stop of a text is a word of its own.
        instructions_util.nltk.word_tokenize = lambda text: [
            word for sentence in split(text) for word in words(sentence, preserve_line=True)
        ]
    module: ModuleType = utils
    return module
