"""Short writing tasks with instructions that IFEval's checkers can verify, as rows of IFEval.

An item is a topic with one or two instructions. `respond` writes a text that follows them; what each must look like is decided
by lm_eval's checkers, and a test runs them over drawn items. The key is the topic with the instructions and their numbers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from examples.family.splits import Item, words

LAZY = "Sorry, I do not know."
"""The lazy answer: it has a comma, both cases and nothing else that an instruction asks for."""

ADJECTIVES = words("old small red green quiet cold warm white blue dark long round")
NOUNS = words(
    "river bridge house garden town market forest boat road tower field lake school table lamp clock window door stone tree "
    "horse bird book song"
)
KEYWORDS = words(
    "apple bread cloud flower grass honey island king letter milk night paper queen rain salt snow summer water"
)
PHRASES = (
    "That is all.",
    "This is the end.",
    "Thank you for reading.",
    "Have a nice day.",
    "See you soon.",
    "Now you know it.",
)
PLACEHOLDERS = ("[name]", "[date]", "[place]")


@dataclass
class Draft:
    """A response under construction; instructions change it in the order of `_ORDER`."""

    adjective: str
    noun: str
    sentences: list[str]
    joiner: str = " "
    marker: Callable[[int], str] = field(default=lambda number: "")
    before: str = ""
    after: str = ""
    finish: list[Callable[[str], str]] = field(default_factory=list)

    def text(self) -> str:
        body = self.joiner.join(f"{self.marker(i + 1)}{line}" for i, line in enumerate(self.sentences))
        whole = self.before + body + self.after
        for change in self.finish:
            whole = change(whole)
        return whole


@dataclass(frozen=True)
class Instruction:
    """One instruction of IFEval.

    Attributes:
        name: as IFEval calls it.
        sentence: as the prompt says it.
        kwargs: as IFEval's checker wants them.
        apply: makes a draft follow it.
        group: two instructions of one group exclude each other.
    """

    name: str
    sentence: str
    kwargs: dict[str, Any]
    apply: Callable[[Draft], None]
    group: str


def _sentences(adjective: str, noun: str) -> list[str]:
    return [
        f"The {adjective} {noun} is here, and we like it.",
        f"We see the {noun} every day.",
        f"Many people know the {noun}.",
        f"It is very {adjective}.",
    ]


def _no_comma(rng: random.Random) -> Instruction:
    def apply(draft: Draft) -> None:
        draft.sentences = [line.replace(",", "") for line in draft.sentences]

    return Instruction("punctuation:no_comma", "Do not use any commas.", {}, apply, "comma")


def _lowercase(rng: random.Random) -> Instruction:
    sentence = "Use only lowercase letters."
    return Instruction("change_case:english_lowercase", sentence, {}, lambda d: d.finish.append(str.lower), "case")


def _capital(rng: random.Random) -> Instruction:
    sentence = "Use only capital letters."
    return Instruction("change_case:english_capital", sentence, {}, lambda d: d.finish.append(str.upper), "case")


def _quotation(rng: random.Random) -> Instruction:
    sentence = "Wrap your whole response in double quotation marks."
    return Instruction("startend:quotation", sentence, {}, lambda d: d.finish.append(lambda t: f'"{t}"'), "wrap")


def _end(rng: random.Random) -> Instruction:
    phrase = rng.choice(PHRASES)

    def apply(draft: Draft) -> None:
        draft.after += f" {phrase}"

    return Instruction(
        "startend:end_checker", f"Finish with this exact phrase: {phrase}", {"end_phrase": phrase}, apply, "end"
    )


def _postscript(rng: random.Random) -> Instruction:
    def apply(draft: Draft) -> None:
        draft.after += "\nP.S. Thank you."

    sentence = "At the end, add a postscript starting with P.S."
    return Instruction("detectable_content:postscript", sentence, {"postscript_marker": "P.S."}, apply, "end")


def _title(rng: random.Random) -> Instruction:
    def apply(draft: Draft) -> None:
        draft.before = f"<<The {draft.noun}>>\n" + draft.before

    sentence = "Give it a title in double angular brackets, such as <<title>>."
    return Instruction("detectable_format:title", sentence, {}, apply, "title")


def _bullets(rng: random.Random) -> Instruction:
    count = rng.randint(2, 4)

    def apply(draft: Draft) -> None:
        draft.sentences = draft.sentences[:count]
        draft.joiner, draft.marker = "\n", lambda number: "* "

    name = "detectable_format:number_bullet_lists"
    sentence = f"Write exactly {count} bullet points, such as: * This is a point."
    return Instruction(name, sentence, {"num_bullets": count}, apply, "shape")


def _paragraphs(rng: random.Random) -> Instruction:
    count = rng.randint(2, 4)

    def apply(draft: Draft) -> None:
        draft.sentences, draft.joiner = draft.sentences[:count], "\n***\n"

    sentence = f"Write {count} paragraphs, separated by the divider ***"
    kwargs = {"num_paragraphs": count}
    return Instruction("length_constraints:number_paragraphs", sentence, kwargs, apply, "shape")


def _sections(rng: random.Random) -> Instruction:
    count = rng.randint(2, 4)

    def apply(draft: Draft) -> None:
        draft.sentences = draft.sentences[:count]
        draft.joiner, draft.marker = "\n", lambda number: f"SECTION {number}\n"

    sentence = f"Write {count} sections, and mark the start of each with SECTION X."
    kwargs = {"section_spliter": "SECTION", "num_sections": count}
    return Instruction("detectable_format:multiple_sections", sentence, kwargs, apply, "shape")


def _two_responses(rng: random.Random) -> Instruction:
    def apply(draft: Draft) -> None:
        draft.sentences, draft.joiner = draft.sentences[:2], "\n******\n"

    sentence = "Give two different responses, separated by 6 asterisk symbols: ******"
    return Instruction("combination:two_responses", sentence, {}, apply, "shape")


def _keywords(rng: random.Random) -> Instruction:
    words = rng.sample(KEYWORDS, 2)

    def apply(draft: Draft) -> None:
        draft.sentences = [*draft.sentences[:1], f"It has {words[0]} and {words[1]}.", *draft.sentences[1:]]

    sentence = f"Include the keywords {words[0]} and {words[1]}."
    return Instruction("keywords:existence", sentence, {"keywords": words}, apply, "words")


def _placeholders(rng: random.Random) -> Instruction:
    count = rng.randint(1, 3)

    def apply(draft: Draft) -> None:
        line = f"Ask {' '.join(PLACEHOLDERS[:count])}."
        draft.sentences = [*draft.sentences[:1], line, *draft.sentences[1:]]

    sentence = f"Use at least {count} placeholders in square brackets, such as [name]."
    return Instruction("detectable_content:number_placeholders", sentence, {"num_placeholders": count}, apply, "words")


def _highlights(rng: random.Random) -> Instruction:
    count = rng.randint(1, 3)

    def apply(draft: Draft) -> None:
        for i in range(count):
            words = draft.sentences[i].split()
            draft.sentences[i] = f"*{words[0]} {words[1]}* " + " ".join(words[2:])

    sentence = f"Highlight at least {count} parts, such as *highlighted part*."
    name = "detectable_format:number_highlighted_sections"
    return Instruction(name, sentence, {"num_highlights": count}, apply, "stars")


def _json(rng: random.Random) -> Instruction:
    def apply(draft: Draft) -> None:
        draft.finish.append(lambda text: json.dumps({"text": text}))

    return Instruction("detectable_format:json_format", "Give the whole output in JSON format.", {}, apply, "wrap")


_ORDER = (
    _bullets, _paragraphs, _sections, _two_responses, _no_comma, _keywords, _placeholders, _highlights, _title, _postscript,
    _end, _lowercase, _capital, _quotation, _json,
)  # fmt: skip
"""All instructions, in the order in which they change a draft: its shape, its words, its ends, its letters, its frame."""
_CLASHES = (
    {"shape", "stars"},
    {"shape", "words"},
    {"shape", "case"},
    {"shape", "wrap"},
    {"end", "wrap"},
    {"case", "wrap"},
    {"case", "title"},
)
"""Groups that spoil each other's check: a bullet list has stars, JSON has to be all there is."""


def item(rng: random.Random) -> Item:
    """A topic with one or two instructions, which the answer follows."""
    adjective, noun = rng.choice(ADJECTIVES), rng.choice(NOUNS)
    instructions = _draw_instructions(rng)
    sentences = [entry.sentence for entry in instructions]
    rng.shuffle(sentences)
    start = rng.choice(("Write a short text about", "Write a few lines about", "Tell me about"))
    prompt = f"{start} the {adjective} {noun}. {' '.join(sentences)}"
    draft = Draft(adjective, noun, _sentences(adjective, noun))
    groups = {entry.group for entry in instructions}
    if "shape" not in groups:
        # Three highlights need three sentences; telling the language of a text needs four.
        draft.sentences = draft.sentences[: 4 if "case" in groups else 3 if "stars" in groups else 2]
    for entry in instructions:
        entry.apply(draft)
    names = [entry.name for entry in instructions]
    kwargs = [entry.kwargs for entry in instructions]
    row = {"key": 0, "prompt": prompt, "instruction_id_list": names, "kwargs": kwargs}
    key = f"ifeval {adjective} {noun} {' '.join(sorted(entry.sentence for entry in instructions))}"
    return Item(key, row, prompt, draft.text())


def _draw_instructions(rng: random.Random) -> list[Instruction]:
    """One or two instructions that do not exclude each other, in the order in which they are applied."""
    while True:
        makers = rng.sample(_ORDER, rng.choice((1, 1, 2)))
        chosen = [maker(rng) for maker in sorted(makers, key=_ORDER.index)]
        groups = {entry.group for entry in chosen}
        if len(groups) == len(chosen) and groups not in _CLASHES:
            return chosen


def plain(rng: random.Random) -> str:
    """Template English about the same topics, without an instruction."""
    lines = _sentences(rng.choice(ADJECTIVES), rng.choice(NOUNS))
    rng.shuffle(lines)
    return " ".join(lines[: rng.randint(2, 4)]) + "\n"
