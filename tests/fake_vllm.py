"""A stand-in for vllm 0.32 that lm_eval's VLLM class can be built on: its names, its signatures, its results, on the CPU.

with fake_vllm(monkeypatch) as made:    # `import vllm` works inside
    ...
    made[0].arguments                   # of each LLM that was built
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

VERSION = "0.32.0"


@dataclass
class SamplingParams:
    """Defaults as vllm's: what is not given explicitly samples."""

    temperature: float = 1.0
    max_tokens: int = 16
    stop: list[str] = field(default_factory=list)
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    repetition_penalty: float = 1.0


class TokensPrompt(dict[str, Any]):
    """A prompt as token ids."""


class LLM:
    """Greedy generation by transformers, one request after the other."""

    made: list[LLM]

    def __init__(self, model: str, *, dtype: str = "auto", max_model_len: int | None = None, **arguments: Any):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        self.arguments = {"model": model, "dtype": dtype, "max_model_len": max_model_len, **arguments}
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=max_model_len, dtype=self.model.dtype)
        )
        eos = GenerationConfig.from_pretrained(model).eos_token_id
        self.eos = {self.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
        self.parameters: list[SamplingParams] = []
        LLM.made.append(self)

    def generate(
        self,
        prompts: list[TokensPrompt],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,
    ) -> list[SimpleNamespace]:
        assert sampling_params is not None, "without parameters vllm takes those of the checkpoint"
        each = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(prompts)
        self.parameters += each
        bar = None
        if use_tqdm:
            assert callable(use_tqdm), "vllm's own bar would show beside ours"
            prompts = list(use_tqdm(prompts, desc="Adding requests"))
            bar = use_tqdm(total=len(prompts), desc="Processed prompts", dynamic_ncols=True, postfix="est. speed")
        outputs = []
        for prompt, parameters in zip(prompts, each, strict=True):
            outputs.append(self._answer(prompt["prompt_token_ids"], parameters))
            if bar is not None:
                bar.postfix = f"{1 / bar.format_dict['elapsed']:.2f} toks/s"
                bar.update(1)
        if bar is not None:
            assert bar.n == len(prompts)
            bar.refresh()
            bar.close()
        return outputs

    def _answer(self, prompt: list[int], parameters: SamplingParams) -> SimpleNamespace:
        import torch

        assert parameters.temperature == 0
        assert len(prompt) + 1 <= self.arguments["max_model_len"], "vllm refuses prompts that fill the window"
        if parameters.prompt_logprobs is not None:
            with torch.inference_mode():
                logprobs = self.model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
            scores = [
                {
                    token: SimpleNamespace(logprob=float(logprobs[at, token]))
                    for token in (prompt[at + 1], int(logprobs[at].argmax()))
                }
                for at in range(len(prompt) - 1)
            ]
            return SimpleNamespace(prompt_logprobs=[None, *scores], outputs=[])
        tokens, text, reason = list(prompt), "", "length"
        base = self._decode(prompt[-8:], parameters)
        while len(tokens) - len(prompt) < parameters.max_tokens and len(tokens) < self.arguments["max_model_len"]:
            with torch.inference_mode():
                tokens.append(int(self.model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] in self.eos:
                reason = "stop"
                break
            text = self._decode(tokens[len(prompt) - 8 :], parameters)[len(base) :]
            if any(stop in text for stop in parameters.stop):
                text, reason = min((text.partition(stop)[0] for stop in parameters.stop), key=len), "stop"
                break
        result = SimpleNamespace(text=text, token_ids=tokens[len(prompt) :], finish_reason=reason)
        return SimpleNamespace(prompt_token_ids=prompt, outputs=[result])

    def _decode(self, tokens: list[int], parameters: SamplingParams) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=parameters.skip_special_tokens)


@contextmanager
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[LLM]]:
    """Put the stand-in where `import vllm` finds it; yields the LLMs that are built."""
    from transformers import AutoTokenizer

    contents: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": VERSION, "LLM": LLM, "SamplingParams": SamplingParams, "TokensPrompt": TokensPrompt},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": object},
        "vllm.renderers": {},
        "vllm.renderers.hf": {"resolve_chat_template": lambda tokenizer, **keywords: tokenizer.chat_template},
        "vllm.tokenizers": {"get_tokenizer": _get_tokenizer(AutoTokenizer)},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    # lm_eval's module stays loaded with these very classes: it registers its name once for each process.
    monkeypatch.setattr(LLM, "made", [], raising=False)
    yield LLM.made


def _get_tokenizer(auto: Any) -> Callable[..., Any]:
    def get_tokenizer(name: str, *, tokenizer_mode: str = "auto", **keywords: Any) -> Any:
        return auto.from_pretrained(name, **keywords)

    return get_tokenizer
