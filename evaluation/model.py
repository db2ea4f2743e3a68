"""A loaded model, asked in batches the same way on both backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from checkpoints.errors import InputError
from checkpoints.settings import setting
from evaluation.benchmarks.settings import Advance

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from evaluation.transformers_model import Finish

# What a library, or a class's own code, raises for a folder that is no model it can load.
LOAD_ERRORS = (
    *(OSError, ValueError, RuntimeError, LookupError, ArithmeticError, TypeError),
    *(AttributeError, ImportError, AssertionError, NameError),
)

BackendName = Literal["vllm", "hf"]
CPU_BATCH, GPU_BATCH = 8, 32
SCORE_BATCH = 256
"""Questions that vLLM gets at once where it returns logprobs of prompts, which take memory that it does not plan for."""


@dataclass(frozen=True)
class ModelOptions:
    """How a model is loaded.

    Attributes:
        backend: decided by `backends.choose_backend`.
        dtype: auto, bfloat16, float16 or float32.
        n_gpu: GPUs to spread it over; 0 for the CPU.
        max_model_len: the largest window, in tokens; the model's own may be smaller.
        batch_size: None for automatic.
        seed: handed to vLLM.
        trust_remote_code: let Python files of the checkpoint run.
    """

    backend: BackendName
    dtype: str = "bfloat16"
    n_gpu: int = 0
    max_model_len: int = 4096
    batch_size: int | None = None
    seed: int = 1234
    trust_remote_code: bool = False


class Model:
    """A loaded model.

    Attributes:
        lm: `TransformersModel` or `VllmModel`.
        label: how messages name it.
        backend, window (tokens), options: how it was loaded.
        batch_size: the current one; None where vLLM schedules by itself.
        ignored: settings of its generation_config that have no effect.
    """

    def __init__(self, lm: Any, label: str, options: ModelOptions, window: int, ignored: dict[str, Any]):
        self.lm = lm
        self.label = label
        self.options = options
        self.backend = options.backend
        self.window = window
        self.ignored = ignored
        self.batch_size = options.batch_size
        if self.batch_size is None and self.backend == "hf":
            self.batch_size = GPU_BATCH if options.n_gpu else CPU_BATCH

    @property
    def dtype(self) -> str:
        """What the weights are in: as asked, or as the checkpoint has them where `auto` was asked."""
        if self.options.dtype != "auto":
            return self.options.dtype
        inner = self.lm.model
        dtype = inner.dtype if self.backend == "hf" else inner.llm_engine.model_config.dtype
        return str(dtype).removeprefix("torch.")

    def limits(self, rooms: Sequence[int]) -> list[int]:
        """How many new tokens each row of a batch gets, of those that it has room for: transformers knows one limit for all."""
        return list(rooms) if self.backend == "vllm" else [min(rooms)] * len(rooms)

    def batches(
        self, jobs: Sequence[Any], key: Callable[[Any], int] = lambda job: 0, *, score: bool = False
    ) -> Iterator[list[Any]]:
        """Cut jobs into what is sent at once: neighbours with the same key. The size may shrink on the way, where memory does
        not suffice."""
        start = 0
        while start < len(jobs):
            if self.backend == "vllm" and not score:
                yield list(jobs[start:])  # vLLM schedules by itself, and minds each request's limit
                return
            size = SCORE_BATCH if self.backend == "vllm" else self.batch_size or 1
            batch = [job for job in jobs[start : start + size] if key(job) == key(jobs[start])]
            yield batch
            start += len(batch)

    def generate_batch(self, prompts: Sequence[tuple[Instance, int]], advance: Advance) -> list[Finish]:
        """Texts and how they ended, in order; they may hold more than the first stop string cuts off.

        Args:
            prompts: lm_eval's request, and the tokens of its prompt.
            advance: called with numbers of prompts as they are done.

        Raises: InputError: the GPU's memory does not suffice for one prompt, or for the batch size that was asked for.
        """
        if self.backend == "vllm":
            self.lm.advance = advance
            return self._generate(prompts)
        results = self._halving(prompts, self._generate)
        advance(len(prompts))
        return results

    def score_batch(self, choices: Sequence[Sequence[Instance]], advance: Advance) -> list[list[float]]:
        """Loglikelihoods of the choices of each question, in order. Arguments and errors as `generate_batch`."""
        results = self._halving(choices, self._score)
        advance(len(choices))
        return results

    def _generate(self, prompts: Sequence[tuple[Instance, int]]) -> list[Finish]:
        if self.backend == "hf":
            self.lm.batch_size_per_gpu = len(prompts)
        self.lm.finished = []
        self.lm.generate_until([instance for instance, _ in prompts], disable_tqdm=True)
        # lm_eval's models sort by length, then text; `finished` is in that order.
        order = sorted(range(len(prompts)), key=lambda at: (-prompts[at][1], prompts[at][0].args[0]))
        finished: dict[int, Finish] = dict(zip(order, self.lm.finished, strict=True))
        return [finished[at] for at in range(len(prompts))]

    def _score(self, choices: Sequence[Sequence[Instance]]) -> list[list[float]]:
        instances = [instance for question in choices for instance in question]
        if self.backend == "hf":
            self.lm.batch_size_per_gpu = len(instances)
        scores = iter(self.lm.loglikelihood(instances, disable_tqdm=True))
        return [[float(next(scores)[0]) for _ in question] for question in choices]

    def _halving(self, requests: Sequence[Any], send: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
        """Send; where memory does not suffice, and the batch size is ours to choose, send halves."""
        import torch

        try:
            return send(requests)
        except torch.OutOfMemoryError as error:
            if self.options.batch_size is not None or len(requests) < 2:
                raise InputError(
                    f"{self.label}: out of memory with {len(requests)} prompts at once. Give a smaller {setting('batch_size')} or "
                    f"{setting('max_model_len')}, or more GPUs ({setting('n_gpu')})."
                ) from error
        torch.cuda.empty_cache()
        half = len(requests) // 2
        self.batch_size = min(self.batch_size or half, half)
        return self._halving(requests[:half], send) + self._halving(requests[half:], send)
