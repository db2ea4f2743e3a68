"""Ask a loaded model a benchmark, and grade what it answers: prompts, responses, grades."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evaluation.benchmarks.contract import Benchmark, Grade, Response
from evaluation.benchmarks.settings import Advance, Settings
from evaluation.data import Data
from evaluation.grading.tools import Tools
from evaluation.thinking import answers_of, to_think

if TYPE_CHECKING:
    from evaluation.model import Model
    from evaluation.prompts import Request


def build(
    model: Model, benchmark: Benchmark, data: Data, indices: Sequence[int], settings: Settings, advance: Advance
) -> list[Request]:
    """The requests of some rows, which depend on the model's tokenizer and chat template alone.

    Args:
        indices: of the rows.
        advance: called with 1 for each row done.

    Raises: InputError: the chat template fails.
    """
    from evaluation.chat_template import confined
    from evaluation.prompts import build_requests

    model.lm.add_bos_token = False if benchmark.adds_no_bos(settings) else None
    with confined(model.label):
        return build_requests(
            benchmark,
            [(index, data.rows[index]) for index in indices],
            settings,
            fewshots=data.fewshots,
            chat_template=model.lm.apply_chat_template,
            count_tokens=lambda text: len(model.lm.tok_encode(text)),
            advance=advance,
        )


def answer(
    model: Model, benchmark: Benchmark, requests: Sequence[Request], settings: Settings, advance: Advance
) -> list[Response]:
    """What a model answers, in the order of the requests: generated text, or the likeliest choice.

    Args:
        advance: called with numbers of requests as they are done.

    Raises: InputError: the GPU's memory does not suffice.
    """
    from evaluation.generation import choose, generate

    model.lm.add_bos_token = False if benchmark.adds_no_bos(settings) else None
    generation = to_think(benchmark.generation(settings), settings.think_end)
    if generation is None:
        return choose(model, requests, benchmark.choices, advance)
    return generate(model, requests, generation, advance)


def grade(
    benchmark: Benchmark, data: Data, responses: Sequence[Response], settings: Settings, tools: Tools, advance: Advance
) -> list[Grade]:
    """The grade of each response; what the model had no room to answer counts as unanswered.

    Args:
        advance: called with numbers of responses as they are graded; of those that were answered.
    """
    sent = [number for number, response in enumerate(responses) if response.finish != "no_room"]
    generation = benchmark.generation(settings)
    answers = answers_of(responses, settings.think_end, () if generation is None else generation.stop)
    rows = [data.rows[responses[number].index] for number in sent]
    given = benchmark.grade(rows, [answers[number] for number in sent], tools, advance)
    by_number = dict(zip(sent, given, strict=True))
    return [
        by_number.get(number) or benchmark.unanswered(data.rows[response.index])
        for number, response in enumerate(responses)
    ]
