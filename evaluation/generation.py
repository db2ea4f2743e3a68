"""From prompts to responses, the same way on both backends: what fits, in which batches, what came back.

Nothing is ever cut from a prompt. A prompt and its new tokens share the window: new tokens = min(setting, window - prompt).
A prompt that leaves no room is not sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from checkpoints.errors import InputError
from evaluation.benchmarks.contract import Generation, Response, until_stop
from evaluation.benchmarks.settings import Advance

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from evaluation.model import Model
    from evaluation.prompts import Request
    from evaluation.transformers_model import Finish


def generate(model: Model, requests: Sequence[Request], generation: Generation, advance: Advance) -> list[Response]:
    """Generate greedily for every request.

    Args:
        model: from `backends.load_model`.
        requests: one prompt each.
        generation: the limit and the stop strings.
        advance: called with numbers of requests as they are done.

    Returns: responses aligned with `requests`.
    """

    def send(batch: Sequence[_Job], limits: Sequence[int], tell: Advance) -> list[Finish]:
        prompts = [(job.instance(generation, limit), job.tokens) for job, limit in zip(batch, limits, strict=True)]
        return model.generate_batch(prompts, tell)

    responses: list[Response | None] = [None] * len(requests)
    jobs = []
    for position, request in enumerate(requests):
        tokens = len(model.lm.tok_encode(request.prompt))
        room = min(generation.max_new_tokens, model.window - tokens)
        if room < 1:
            responses[position] = Response(request.index, "", "no_room", tokens, 0, prompt=request.prompt)
            advance(1)
        else:
            jobs.append(_Job(position, request, tokens, room))
    # The longest prompts first: what needs most memory fails early, and they leave the least room.
    jobs.sort(key=lambda job: (-job.tokens, job.room))
    pressed: list[_Job] = []
    for batch in model.batches(jobs):
        # Few rows need all their room, so that a batch may do with the least of it; those that do not go once more.
        limits = model.limits([job.room for job in batch])
        for job, limit, finish in zip(batch, limits, send(batch, limits, advance), strict=True):
            if finish.by_limit and limit < job.room:
                pressed.append(job)
            else:
                responses[job.position] = job.response(finish, generation)
    for batch in model.batches(pressed, key=lambda job: job.room):
        for job, finish in zip(batch, send(batch, [job.room for job in batch], lambda count: None), strict=True):
            responses[job.position] = job.response(finish, generation)
    return [response for response in responses if response is not None]


def choose(model: Model, requests: Sequence[Request], letters: Sequence[str], advance: Advance) -> list[Response]:
    """Take the choice with the highest loglikelihood for every request; the first one of equals.

    Args:
        model: from `backends.load_model`.
        requests: each with one instance per choice.
        letters: names of the choices, in order.
        advance: called with numbers of requests as they are done.

    Returns: responses aligned with `requests`, `text` the letter.
    """
    responses: list[Response | None] = [None] * len(requests)
    jobs = []
    for position, request in enumerate(requests):
        tokens = len(model.lm.tok_encode(request.prompt))
        if _longest(model, request, tokens) > model.window - 1:  # vLLM needs one place for a token of its own
            responses[position] = Response(request.index, "", "no_room", tokens, 0, prompt=request.prompt)
            advance(1)
        else:
            jobs.append(_Job(position, request, tokens, 0))
    jobs.sort(key=lambda job: -job.tokens)
    for batch in model.batches(jobs, score=True):
        for job, own in zip(batch, model.score_batch([job.request.instances for job in batch], advance), strict=True):
            best = max(range(len(own)), key=lambda choice: (own[choice], -choice))
            responses[job.position] = Response(
                job.request.index,
                letters[best],
                "stop",
                job.tokens,
                0,
                loglikelihoods=tuple(round(score, 6) for score in own),
                prompt=job.request.prompt,
            )
    return [response for response in responses if response is not None]


class _Job:
    """A request on its way: its place in the list, its tokens, and how many new ones it may get."""

    def __init__(self, position: int, request: Request, tokens: int, room: int):
        self.position = position
        self.request = request
        self.tokens = tokens
        self.room = room

    def instance(self, generation: Generation, limit: int) -> Instance:
        """lm_eval's request for at most `limit` new tokens."""
        settings: dict[str, Any] = {
            "until": list(generation.stop),
            "max_gen_toks": limit,
            "do_sample": False,
            "temperature": 0.0,
        }
        original = self.request.instances[0]
        return replace(original, arguments=(self.request.prompt, settings), resps=[], filtered_resps={})

    def response(self, finish: Finish, generation: Generation) -> Response:
        """What came back for it, cut at the first stop string."""
        return Response(
            self.request.index,
            until_stop(finish.text, generation.stop),
            "length" if finish.by_limit else "stop",
            self.tokens,
            finish.new_tokens,
            shortened=self.room < generation.max_new_tokens,
            prompt=self.request.prompt,
        )


def check_bos(model: Model, prompt: str) -> dict[str, Any]:
    """What BOS does in a benchmark's prompts, seen in the first one.

    Returns: `first_tokens`, ids of the first five; `bos_token_id`; `bos_count`, BOS tokens at the start.
    Raises: InputError: BOS comes twice, which a chat template and a tokenizer may do together.
    """
    tokens = list(model.lm.tok_encode(prompt))
    bos = model.lm.tokenizer.bos_token_id
    count = 0
    while bos is not None and tokens[count : count + 1] == [bos]:
        count += 1
    if count > 1:
        raise InputError(
            f"{model.label}: expected one BOS token at the start of a prompt, got {count}: the chat template and the tokenizer "
            "both add it. Mend one of them in tokenizer_config.json."
        )
    return {"first_tokens": tokens[:5], "bos_token_id": bos, "bos_count": count}


def _longest(model: Model, request: Request, tokens: int) -> int:
    """Tokens of the prompt with its longest choice; counted only where a bound by bytes does not settle it."""
    bytes_of_choices = max(len(instance.args[1].encode()) for instance in request.instances)
    if tokens + bytes_of_choices + 1 <= model.window - 1:
        return tokens + bytes_of_choices + 1
    return max(len(model.lm.tok_encode(request.prompt + instance.args[1])) for instance in request.instances)
