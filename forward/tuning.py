"""Choose how a model is run fastest on this machine, by timing one of its layers for some seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from checkpoints.source import FLOAT_DTYPES
from forward.layers import call_of, cast, find_layers
from forward.loading import has_caps

WORTH_FLOPS = 5e11
"""Work below this takes seconds however it is done, and is not timed."""
BETTER = 1.1
"""How many times as fast another setting has to be before it is taken."""
BATCHES = (2, 4)
LONG_S = 0.5
"""A step that takes longer is timed once."""


@dataclass(frozen=True)
class Choice:
    """How a model is run.

    Attributes:
        dtype: of the forward pass, by its name.
        threads: of torch.
        batch_size: blocks of a forward pass.
        attention: implementation of transformers; None for what the model was loaded with.
    """

    dtype: str
    threads: int
    batch_size: int = 1
    attention: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        attention = f", {self.attention} attention" if self.attention else ""
        return f"{self.dtype}, {threads}, {self.batch_size} block{'s' * (self.batch_size != 1)} at a time{attention}"


def is_choice(fields: dict[str, Any]) -> bool:
    """Whether these are the fields of a choice, as JSON gave them."""
    return bool(
        fields.keys() == {"dtype", "threads", "batch_size", "attention"}
        and fields["dtype"] in FLOAT_DTYPES
        and all(type(fields[key]) is int and fields[key] > 0 for key in ("threads", "batch_size"))
        and fields["attention"] in (None, "sdpa", "eager")
    )


def is_worth_timing(model: Any, tokens: int) -> bool:
    """Whether the work is long enough for its settings to be timed."""
    size: int = sum(parameter.numel() for parameter in model.parameters())
    return 2.0 * size * tokens > WORTH_FLOPS


def choose(
    model: Any, tokens: torch.Tensor, start: Choice, *, dtype: bool, batch: bool
) -> tuple[Choice, dict[str, float]]:
    """The fastest settings, found by timing the model's first layer one setting after the other.

    float32 may take the place of the dtype that the model is loaded in, never a coarser one. Nothing of the model is changed.

    Args:
        tokens: `[blocks, tokens]`, on the model's device.
        start: what to start from.
        dtype, batch: whether to choose those.

    Returns: the choice, and tokens a second of the layer with each that was tried; `start` where there are no layers.
    """
    layers = find_layers(model)
    if not layers:
        return start, {}
    trial = Trial(model, layers[0][1], tokens)
    on_cpu = tokens.device.type == "cpu"
    best = start
    with torch.no_grad():
        if dtype and on_cpu and start.dtype != "float32":
            best = trial.fastest(best, [replace(best, dtype="float32")])
        if on_cpu and start.threads > 1:
            best = trial.fastest(best, [replace(best, threads=count) for count in _thread_counts(start.threads)])
        if batch:
            best = trial.fastest(best, [replace(best, batch_size=size) for size in BATCHES if size <= len(tokens)])
        if model.config._attn_implementation == "sdpa" and not has_caps(model):
            best = trial.fastest(best, [replace(best, attention="eager")])
    return best, trial.rates


def _thread_counts(threads: int) -> list[int]:
    return sorted({1, threads // 2} - {0, threads})


class Trial:
    """Times one layer under different settings."""

    def __init__(self, model: Any, layer: torch.nn.Module, tokens: torch.Tensor):
        self._model, self._layer, self._tokens = model, layer, tokens
        self._own = {name: parameter.dtype for name, parameter in layer.named_parameters()}
        self.rates: dict[str, float] = {}

    def fastest(self, best: Choice, others: Sequence[Choice]) -> Choice:
        """The first, or another that is clearly faster."""
        for other in others:
            if self._rate(other) > BETTER * self._rate(best):
                best = other
        return best

    def _rate(self, choice: Choice) -> float:
        """Tokens a second; the better of what was measured now and before."""
        key = str(choice)
        if key not in self.rates:
            self.rates[key] = self.measure(choice)
        return self.rates[key]

    def measure(self, choice: Choice) -> float:
        """Tokens a second of the layer under these settings; 0 where the model does not call it."""
        tokens = self._tokens[: choice.batch_size]
        attention = self._model.config._attn_implementation
        if choice.attention:
            self._model.set_attn_implementation(choice.attention)
        try:
            call = call_of(self._layer, lambda: self._model(input_ids=tokens, use_cache=False))
            if call is None:
                return 0.0
            dtype = FLOAT_DTYPES[choice.dtype]
            args, kwargs = cast(call, dtype)
            with threads(choice.threads), self._in(dtype):
                seconds = _seconds(lambda: self._layer(*args, **kwargs), tokens.device)
        finally:
            if choice.attention:
                self._model.set_attn_implementation(attention)
        return tokens.numel() / seconds

    @contextmanager
    def _in(self, dtype: torch.dtype) -> Iterator[None]:
        """Have the layer in another dtype, a wider one, so that it comes back as it was."""
        changed = [one for one in self._layer.parameters() if one.is_floating_point() and one.dtype != dtype]
        before = [tensor.data for tensor in changed]
        for tensor in changed:
            tensor.data = tensor.data.to(dtype)
        try:
            yield
        finally:
            for tensor, data in zip(changed, before, strict=True):
                tensor.data = data


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    """Of the quickest of up to three runs; what is slow only the first time does not count."""
    taken: list[float] = []
    while len(taken) < 4 and (len(taken) < 2 or taken[-1] < LONG_S):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return max(min(taken), 1e-9)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute with so many threads for the length of the context."""
    before = torch.get_num_threads()
    if count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count != before:
            torch.set_num_threads(before)


def apply(model: Any, choice: Choice) -> None:
    """Have a model use an attention implementation."""
    if choice.attention:
        model.set_attn_implementation(choice.attention)
