"""lm_eval's VLLM with our progress, and with a record of how each text ended. Importing it needs vllm."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import Any
from unittest import mock

import psutil
import vllm
from vllm import SamplingParams, TokensPrompt

from evaluation.model import ModelOptions
from evaluation.transformers_model import Finish

# lm_eval asks for the version of the distribution `vllm`, which the one for CPUs is not: the package itself knows.
_version = metadata.version
with mock.patch.object(metadata, "version", lambda name: vllm.__version__ if name == "vllm" else _version(name)):
    from lm_eval.models.vllm_causallms import VLLM

GPU_MEMORY_SHARE = 0.8
"""Below vLLM's default: the logprobs of whole prompts, which MMLU asks for, come on top of what vLLM plans for."""
CPU_CACHE_SHARE = 0.25
"""Of the memory that is free, for keys and values. vLLM by itself would take nearly all of the machine's."""


def cpu_arguments() -> dict[str, Any]:
    """What vLLM is told besides on a CPU. Without compilation it needs no C++ compiler, and computes as transformers does."""
    return {"kv_cache_memory_bytes": int(psutil.virtual_memory().available * CPU_CACHE_SHARE), "enforce_eager": True}


class VllmModel(VLLM):
    """VLLM under lm_eval.

    It passes explicit sampling parameters, so a checkpoint's generation_config does not change decoding; vLLM itself adds that
    file's EOS tokens to the ones that end a text.

    Attributes:
        finished: of everything generated since it was last cleared, in lm_eval's order.
        advance: called with numbers of requests as they finish.
    """

    def __init__(self, folder: str, options: ModelOptions, *, window: int, on_cpu: bool):
        memory = cpu_arguments() if on_cpu else {"gpu_memory_utilization": GPU_MEMORY_SHARE}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch, about vLLM's use of it
            super().__init__(
                pretrained=folder,
                dtype=options.dtype,
                max_model_len=window,
                tensor_parallel_size=max(1, options.n_gpu),
                seed=options.seed,
                batch_size="auto",
                max_batch_size=options.batch_size,  # vLLM's max_num_seqs
                trust_remote_code=options.trust_remote_code,
                use_tqdm_on_load=False,
                **memory,
            )
        self.finished: list[Finish] = []
        self.advance: Callable[[int], object] = lambda count: None

    def _model_generate(
        self, requests: list[list[int]], generate: bool = False, sampling_params: Any = None
    ) -> list[Any]:
        """Generate for token lists, or score them where `generate` is false; as VLLM's, in the order given."""
        prompts = [TokensPrompt(prompt_token_ids=request) for request in requests]
        if not generate:
            scoring = SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False)
            return list(self.model.generate(prompts, sampling_params=scoring, use_tqdm=False))
        outputs = list(self.model.generate(prompts, sampling_params=sampling_params, use_tqdm=self._bar))
        self.finished += [
            Finish(output.text, len(output.token_ids), output.finish_reason == "length")
            for output in (request.outputs[0] for request in outputs)
        ]
        return outputs

    def _bar(self, requests: Iterable[Any] | None = None, **keywords: Any) -> Any:
        """What vLLM takes for tqdm: the bar that counts finished requests, or the bare iterable that it adds them from."""
        return _Bar(self.advance) if requests is None else requests


class _Bar:
    """The part of tqdm that vLLM uses, passing counts on."""

    def __init__(self, advance: Callable[[int], object]):
        self._advance = advance
        self._started = time.monotonic()
        self.n = 0
        self.postfix = ""

    @property
    def format_dict(self) -> dict[str, float]:
        return {"elapsed": max(1e-9, time.monotonic() - self._started)}

    def update(self, count: int = 1) -> None:
        self.n += count
        self._advance(count)

    def refresh(self) -> None:
        """Nothing to draw."""

    def close(self) -> None:
        """Nothing to close."""

    def set_postfix_str(self, text: Sequence[str] = "", refresh: bool = True) -> None:
        """Nothing to show."""
