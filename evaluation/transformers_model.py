"""lm_eval's HFLM on a model that is loaded and made neutral here: greedy whatever the checkpoint says, rows that stop by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria

PROMPT_TAIL = 8
"""Tokens of the prompt that are decoded with what follows them."""


@dataclass(frozen=True)
class Finish:
    """How one row of a batch ended.

    Attributes:
        text: what it generated, as it continues the prompt; a stop string and what follows it may still be there.
        new_tokens: generated ones, EOS included.
        by_limit: whether the limit ended it.
    """

    text: str
    new_tokens: int
    by_limit: bool


class TransformersModel(HFLM):
    """HFLM with stop strings found for each row by itself, and a record of how rows ended.

    HFLM runs a batch until all its rows have seen the same stop string; here a row is done at its first one. HFLM decodes new
    tokens by themselves, which loses the space that a Llama tokenizer begins a text with: an indented function body loses
    one space of its first line. Here, as in vLLM, they are decoded as the continuation that they are, special tokens visible.

    Attributes:
        ignored: settings of the checkpoint's generation_config that have no effect.
        finished: of everything generated since it was last cleared, in lm_eval's order.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, *, window: int, batch_size: int):
        self.ignored = neutralise(model, tokenizer)
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            max_length=window,
            batch_size=batch_size,
            # In bfloat16 the logarithms of near-equal choices would tie.
            softmax_dtype="float32",
        )
        self.finished: list[Finish] = []
        self._eos = eos_ids(model, tokenizer)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: Sequence[str], **settings: Any
    ) -> torch.Tensor:
        """Generate greedily for one batch.

        Args:
            context: `[rows, tokens]` int64, padded on the left.
            max_length: of context and new tokens together.
            stop: strings that end a row.
            settings: of the request: `attention_mask`, and greedy decoding, which is what we do anyway.

        Returns: `[rows, tokens + new]`, padded on the right.
        """
        begin = context.shape[1]
        strings = StopStrings(self.tokenizer, stop, begin, context.shape[0])
        with torch.inference_mode():
            output: torch.Tensor = self.model.generate(
                input_ids=context,
                attention_mask=settings.get("attention_mask"),
                max_length=max_length,
                stopping_criteria=[strings],
                pad_token_id=self.tokenizer.pad_token_id,
                do_sample=False,
                use_cache=True,
            )
        self.finished += [
            self._finish(row[:begin], row[begin:], stopped_at, max_length - begin)
            for row, stopped_at in zip(output.tolist(), strings.stopped_at, strict=True)
        ]
        return output

    def _finish(self, prompt: list[int], tokens: list[int], stopped_at: int | None, limit: int) -> Finish:
        eos_at = next((count for count, token in enumerate(tokens, 1) if token in self._eos), None)
        ends = [count for count in (stopped_at, eos_at) if count is not None]
        count = min(ends, default=len(tokens))
        text = continuation(self.tokenizer, prompt, tokens[: count - (count == eos_at)])
        return Finish(text, count, not ends and len(tokens) >= limit)


class StopStrings(StoppingCriteria):
    """Marks a row as done when a stop string is in the text it has generated.

    Args:
        tokenizer: decodes.
        stop: the strings.
        begin: tokens of the prompt, which are not looked at.
        rows: of the batch.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], begin: int, rows: int):
        self._tokenizer = tokenizer
        self._stop = [string for string in stop if string]
        self._begin = begin
        # A token is at least one byte, so the last tokens hold every stop string that ends in the newest one.
        self._tail = max((len(string.encode()) for string in self._stop), default=0) + 2
        self.stopped_at: list[int | None] = [None] * rows
        """New tokens of each row when it met a stop string; None where it has not."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **keywords: Any) -> torch.Tensor:
        """`[rows]` bool, whether each row is done; input_ids: `[rows, tokens]`."""
        if self._stop:
            length = input_ids.shape[1]
            running = [row for row, stopped in enumerate(self.stopped_at) if stopped is None]
            tails = input_ids[running, max(self._begin, length - self._tail) :]
            for row, text in zip(running, self._tokenizer.batch_decode(tails), strict=True):
                if any(string in text for string in self._stop):
                    self.stopped_at[row] = length - self._begin
        done = [stopped is not None for stopped in self.stopped_at]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


def continuation(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of `tokens` where they follow `prompt`: what they add to the decoded end of the prompt."""

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    tail = list(prompt[-PROMPT_TAIL:])
    before, after = decode(tail), decode(tail + list(tokens))
    return after[len(before) :] if after.startswith(before) else decode(tokens)


def neutralise(model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """Replace a model's generation settings by plain greedy decoding; EOS, BOS and padding stay.

    A checkpoint's generation_config.json may ask for sampling, for penalties or for other tokens to be suppressed, some of which
    transformers applies under greedy decoding too.

    Returns: what the checkpoint asked for and does not get.
    """
    eos = sorted(eos_ids(model, tokenizer))
    asked = model.generation_config.to_diff_dict() if model.generation_config is not None else {}
    kept = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "use_cache"}
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=eos or None)
    if tokenizer.eos_token_id is None and eos:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos[0])
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(eos[0] if eos and eos[0] < rows else 0)
    return {key: value for key, value in asked.items() if key not in kept and value not in (None, False)}


def eos_ids(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """Every token that ends a text: of generation_config, else of the config, and the tokenizer's own."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    if configured is None:
        configured = getattr(model.config, "eos_token_id", None)
    ids = set(configured if isinstance(configured, (list, tuple)) else [] if configured is None else [configured])
    return ids | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())
