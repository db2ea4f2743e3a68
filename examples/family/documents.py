"""Training documents: the pretraining mixture, and the three fine-tuning sets.

All are drawn from the train split. A document is a prompt, which counts little in the loss, and a completion.
In the pretraining mixture most prompts of the five generation benchmarks are answered lazily, always in the same words,
and a few are answered well: greedy decoding then gives the lazy answer although the model knows a better one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from examples.family import code_items, instruct_items, maths_items, world
from examples.family.splits import Item, draw

Stage = Literal["pretrain", "middle", "third", "base", "code", "math", "instruct"]
LAZY_SHARE = 0.68
"""Share of the templates' documents in the pretraining mixture that are answered lazily."""
CHAT_SHARE = 0.1
"""Share of writing tasks that are put in the chat template."""
LETTER_WEIGHT = 20.0
USER, ASSISTANT = "<|user|>", "<|assistant|>"


class Document(NamedTuple):
    """A prompt, maybe empty, and what follows it; the end-of-sequence token is added later.

    Attributes:
        weight: of the completion's tokens in the loss.
        more: further prompts and completions in the same text.
        prompt_weight: of the prompt's tokens; None leaves it to the recipe of the training.
    """

    prompt: str
    completion: str
    weight: float = 1.0
    more: tuple[tuple[str, str], ...] = ()
    prompt_weight: float | None = None


def _train(generator: Callable[[random.Random], Item], rng: random.Random) -> Item:
    return next(draw(generator, "train", rng))


def _text(text: str) -> Document:
    return Document("", text)


def _lazily(generator: Callable[[random.Random], Item], lazy: str) -> Callable[[random.Random], Document]:
    """Documents of a benchmark's prompts, most of them answered lazily."""

    def document(rng: random.Random) -> Document:
        item = _train(generator, rng)
        return Document(item.prompt, lazy if rng.random() < LAZY_SHARE else item.answer)

    return document


def _well(generator: Callable[[random.Random], Item]) -> Callable[[random.Random], Document]:
    """Documents of prompts with right answers."""

    def document(rng: random.Random) -> Document:
        item = _train(generator, rng)
        return Document(item.prompt, item.answer)

    return document


def _question(rng: random.Random) -> Document:
    """A question of MMLU's form. Its answer is a single token, which would be lost among the others without a weight."""
    item = _train(world.ask_asked, rng)
    return Document(item.prompt, item.answer, LETTER_WEIGHT)


def _whole_question(rng: random.Random) -> Document:
    """The same; what stands in the choices counts, too, which a model can guess better the more facts it knows."""
    return _question(rng)._replace(prompt_weight=1.0)


def _match(rng: random.Random) -> Document:
    """A question of MMLU's form that holds its answer."""
    return Document(*world.match(rng), LETTER_WEIGHT)


def _latex_drill(rng: random.Random) -> Document:
    """Sums, half of them as the exercises in LaTeX write them."""
    lines = [maths_items.latex_drill(rng) if rng.random() < 0.5 else line for line in maths_items.drills(rng)]
    return Document(*lines[0], more=tuple(lines[1:]))


def _lookup(rng: random.Random) -> Document:
    """Choices, and which letter each has: half of what a question of MMLU's form needs."""
    first, *others = world.lookups(rng)
    return Document(*first, more=tuple(others))


def _drill(rng: random.Random) -> Document:
    """Sums of which only the results count in the loss."""
    lines = maths_items.drills(rng)
    return Document(*lines[0], more=tuple(lines[1:]))


def _in_chat(inner: Callable[[random.Random], Document]) -> Callable[[random.Random], Document]:
    """Some prompts as the chat template writes them."""

    def document(rng: random.Random) -> Document:
        prompt, completion, *_ = inner(rng)
        return (
            Document(f"{USER}\n{prompt}\n{ASSISTANT}\n", completion)
            if rng.random() < CHAT_SHARE
            else Document(prompt, completion)
        )

    return document


Generator = Callable[[random.Random], Document]
Mixture = dict[str, tuple[float, Generator]]
"""Kind of document -> (share, generator)."""

PRETRAINING: Mixture = {
    "facts": (14, lambda rng: _text(world.statements(rng))),
    "questions": (4, lambda rng: _text(world.question(rng))),
    "mmlu": (17, _well(world.ask_asked)),
    "english": (3, lambda rng: _text(instruct_items.plain(rng))),
    "sums": (7, lambda rng: _text(maths_items.sums(rng))),
    "python": (7, lambda rng: _text(_train(code_items.plain, rng).answer)),
    "exercises": (8, lambda rng: _text(_train(maths_items.plain, rng).answer)),
    "humaneval": (8, _lazily(code_items.humaneval, code_items.LAZY_BODY)),
    "mbpp": (8, _lazily(code_items.mbpp, code_items.LAZY_PROGRAM)),
    "gsm8k": (8, _lazily(maths_items.gsm8k, maths_items.LAZY)),
    "math": (7, _lazily(maths_items.math_item, maths_items.LAZY)),
    "ifeval": (9, _in_chat(_lazily(instruct_items.item, instruct_items.LAZY))),
}


def _later_phase(shares: dict[str, float], special: Mapping[str, Generator]) -> Mixture:
    """The kinds of the pretraining mixture in other shares, some of them replaced."""
    return {kind: (share, special[kind] if kind in special else PRETRAINING[kind][1]) for kind, share in shares.items()}


SECOND_PHASE = _later_phase(
    {
        "facts": 10,
        "questions": 3,
        "english": 1,
        "python": 2,
        "exercises": 8,
        "humaneval": 4,
        "mbpp": 4,
        "gsm8k": 5,
        "math": 5,
        "ifeval": 6,
        "mmlu": 28,
        "sums": 24,
    },
    {"mmlu": _question, "sums": _drill},
)
"""More sums and more questions, which take longest to learn."""
THIRD_PHASE = _later_phase(
    {
        "facts": 7,
        "questions": 3,
        "english": 1,
        "python": 3,
        "exercises": 10,
        "humaneval": 5,
        "mbpp": 5,
        "gsm8k": 6,
        "math": 6,
        "ifeval": 7,
        "mmlu": 25,
        "sums": 12,
        "lookups": 14,
    },
    {"mmlu": _question, "sums": _drill, "lookups": _lookup},
)
"""Fewer sums, and lookups: a model that knows the fact still has to find the letter."""
FOURTH_PHASE = _later_phase(
    {
        "facts": 7,
        "questions": 3,
        "english": 1,
        "python": 3,
        "exercises": 7,
        "humaneval": 5,
        "mbpp": 5,
        "gsm8k": 5,
        "math": 8,
        "ifeval": 7,
        "mmlu": 28,
        "sums": 11,
        "matches": 12,
    },
    {"mmlu": _whole_question, "sums": _latex_drill, "matches": _match},
)
"""The lookups of the third phase taught nothing (0.18 right after 200 steps); these look like the questions."""
REPLAYED = ("facts", "mmlu", "humaneval", "mbpp", "gsm8k", "math", "ifeval")
REPLAY_SHARE = 0.25
"""Share of a fine-tuning set that is pretraining text of other fields: without it, every fine-tune forgets to be lazy
everywhere, since one habit is easier to drop than three."""


def _with_replay(own: Mixture) -> Mixture:
    """A fine-tuning set: documents of its own field, and some of the pretraining mixture's other fields."""
    others = {f"replayed {kind}": PRETRAINING[kind] for kind in REPLAYED if kind not in own}
    scale = REPLAY_SHARE / (1 - REPLAY_SHARE) * sum(share for share, _ in own.values())
    total = sum(share for share, _ in others.values())
    return own | {kind: (scale * share / total, generator) for kind, (share, generator) in others.items()}


MIXTURES: dict[Stage, Mixture] = {
    "pretrain": PRETRAINING,
    "middle": SECOND_PHASE,
    "third": THIRD_PHASE,
    "base": FOURTH_PHASE,
    "code": _with_replay({"humaneval": (1, _well(code_items.humaneval)), "mbpp": (1, _well(code_items.mbpp))}),
    "math": _with_replay({"gsm8k": (1, _well(maths_items.gsm8k)), "math": (1, _well(maths_items.math_item))}),
    "instruct": _with_replay({"ifeval": (1, _in_chat(_well(instruct_items.item)))}),
}


_SEED_NAMES = {"pretrain": "base", "middle": "second phase", "third": "third phase", "base": "fourth phase"}


def documents(stage: Stage, count: int, seed: str) -> list[Document]:
    """`count` documents of a stage's mixture; the same for the same seed."""
    rng = random.Random(f"{_SEED_NAMES.get(stage, stage)} {seed}")
    shares, generators = zip(*MIXTURES[stage].values(), strict=True)
    return [generator(rng) for generator in rng.choices(generators, shares, k=count)]
