"""Training of one stage: the base model from nothing, or a fine-tune of it. Goes by steps, and goes on where it was stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from examples.family.documents import Document, Stage, documents
from examples.family.tokenizer import WINDOW, load_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SAVE_EVERY = 100
LOG_EVERY = 20


@dataclass(frozen=True)
class Recipe:
    """How a stage is trained.

    Attributes:
        steps: optimizer steps.
        documents: in one step.
        parts: a step's documents, sorted by length, go through the model in so many parts.
        rate: peak learning rate.
        warmup: steps up to it; then it falls in a line, which would be at `end` times the rate after `line` steps.
        cooldown: last steps, in which it falls on to zero.
        prompt_weight: of a prompt's tokens in the loss, where a completion's have 1.
        muon: use Muon for the matrices, and AdamW for the rest; else AdamW for all.
    """

    steps: int
    documents: int
    parts: int
    rate: float
    warmup: int
    line: int
    end: float
    cooldown: int
    prompt_weight: float
    muon: bool
    seed: int


RECIPES: dict[Stage, Recipe] = {
    "pretrain": Recipe(1000, 48, 3, 6e-3, 60, 1300, 0.05, 1, 0.1, True, 1),
    "middle": Recipe(300, 48, 3, 4e-3, 20, 600, 0.03, 1, 0.1, True, 1),
    "third": Recipe(400, 48, 3, 3e-3, 20, 500, 0.02, 1, 0.1, True, 1),
    "base": Recipe(500, 48, 3, 3e-3, 20, 500, 0.02, 1, 0.1, True, 1),
    "code": Recipe(500, 32, 2, 8e-4, 20, 500, 0.1, 1, 0.0, False, 2),
    "math": Recipe(400, 32, 2, 8e-4, 20, 400, 0.1, 1, 0.0, False, 3),
    "instruct": Recipe(400, 32, 2, 6e-4, 20, 400, 0.1, 1, 0.0, False, 4),
}
MODEL = {
    "hidden_size": 128,
    "intermediate_size": 416,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "tie_word_embeddings": True,
    "max_position_embeddings": WINDOW,
}


ATTENTION = "causal_float32"


def causal_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention in float32, for rows that are padded on the right; several times as fast as in bfloat16 on a CPU."""
    parts = [part.float() for part in (query, key, value)]
    mixed = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, scale=options.get("scaling"))
    return mixed.to(value.dtype).transpose(1, 2).contiguous(), None


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """An untrained model, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation=ATTENTION,
        **MODEL,
    )
    return LlamaForCausalLM(config).float()


def optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the matrices inside the layers and AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name and recipe.muon]
    known = set(map(id, matrices))
    rest = [p for p in model.parameters() if id(p) not in known]
    chosen: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    ]
    if matrices:
        chosen.append(torch.optim.Muon(matrices, lr=recipe.rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return chosen


def batch(tokenizer: PreTrainedTokenizerFast, texts: Sequence[Document], prompt_weight: float) -> tuple[Tensor, Tensor]:
    """Token ids `[documents, longest]`, padded on the right, and the weight of each in the loss, same shape.

    Prompt and completion are tokenized apart, as they are when a model is asked.
    """
    rows, weights = [], []
    for text in texts:
        ids: list[int] = []
        row: list[float] = []
        asked = prompt_weight if text.prompt_weight is None else text.prompt_weight
        for prompt, completion in ((text.prompt, text.completion), *text.more):
            before = tokenizer(prompt).input_ids if prompt else []
            after = tokenizer(completion).input_ids
            ids += before + after
            row += [asked] * len(before) + [text.weight] * len(after)
        rows.append([*ids, tokenizer.eos_token_id])
        weights.append([*row, 1.0])
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    return ids, torch.tensor([row + [0.0] * (longest - len(row)) for row in weights])


def loss_sum(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the cross entropies of all next tokens."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights[:, 1:].flatten()).sum()


def length(text: Document) -> int:
    """About how long a document is: MBPP's fixed examples are long, and one token."""
    return len(text.completion) + min(len(text.prompt), 300) + sum(len(p) + len(c) for p, c in text.more)


def rate_at(recipe: Recipe, step: int) -> float:
    """Learning rate of a step: up, slowly down, and to zero at the end."""
    if step < recipe.warmup:
        return recipe.rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / (recipe.line - recipe.warmup)
    return recipe.rate * (1 - (1 - recipe.end) * done) * min(1, (recipe.steps - step) / recipe.cooldown)


def train_step(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, texts: list[Document]
) -> float:
    """Gradients of one step, left in the parameters; returns the mean loss per weighted token."""
    texts = sorted(texts, key=length)
    size = -(-len(texts) // recipe.parts)
    parts = [batch(tokenizer, texts[i : i + size], recipe.prompt_weight) for i in range(0, len(texts), size)]
    total = float(sum(weights[:, 1:].sum() for _, weights in parts))
    value = 0.0
    for ids, weights in parts:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_sum(model, ids, weights) / total
        loss.backward()
        value += float(loss.detach())
    return value


def train(stage: Stage, start: Path, work: Path, recipe: Recipe, position: int = 0) -> LlamaForCausalLM:
    """Train one stage and return the model, float32.

    Args:
        stage: which mixture.
        start: folder of the tokenizer, and of the model that is fine-tuned where the stage is not `base`.
        work: folder for the log `STAGE.jsonl` and the state `STAGE.pt`, from which an interrupted run goes on.
        position: line of the progress bar.
    """
    from transformers import AttentionInterface, LlamaForCausalLM

    AttentionInterface.register(ATTENTION, causal_attention)
    tokenizer = load_tokenizer(start)
    if stage == "pretrain":
        model = new_model(tokenizer, recipe.seed)
    else:
        model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32, attn_implementation=ATTENTION)
    chosen = optimizers(model, recipe)
    state_file, log_file = work / f"{stage}.pt", work / f"{stage}.jsonl"
    first, seconds = 0, 0.0
    if state_file.exists():
        state: dict[str, Any] = torch.load(state_file)
        if state["recipe"] == asdict(recipe):
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(chosen, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            first, seconds = state["step"], state["seconds"]
    lines = log_file.read_text().splitlines()[: first // LOG_EVERY] if first else []
    started = time.monotonic() - seconds
    model.train()
    recent: list[float] = []
    bar = tqdm(
        range(first, recipe.steps), desc=stage, initial=first, total=recipe.steps, position=position, mininterval=1
    )
    for step in bar:
        for optimizer in chosen:
            for group in optimizer.param_groups:
                group["lr"] = rate_at(recipe, step)
        texts = documents(stage, recipe.documents, f"{recipe.seed} {step}")
        recent.append(train_step(model, tokenizer, recipe, texts))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % LOG_EVERY == 0:
            mean = sum(recent) / len(recent)
            entry = {"step": step + 1, "loss": round(mean, 4), "rate": rate_at(recipe, step)}
            lines.append(json.dumps(entry | {"seconds": round(time.monotonic() - started, 1)}))
            bar.set_postfix(loss=f"{mean:.3f}")
            recent = []
        if (step + 1) % SAVE_EVERY == 0 and step + 1 < recipe.steps:
            log_file.write_text("\n".join(lines) + "\n")
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in chosen], "step": step + 1}
            torch.save(state | {"recipe": asdict(recipe), "seconds": time.monotonic() - started}, work / f"{stage}.tmp")
            (work / f"{stage}.tmp").replace(state_file)
    log_file.write_text("\n".join(lines) + "\n")
    return model


def relative_norm(base: LlamaForCausalLM, tuned: LlamaForCausalLM) -> float:
    """|tuned - base| / |base| over all parameters."""
    pairs = list(zip(base.parameters(), tuned.parameters(), strict=True))
    moved = sum(float((b.detach().float() - a.detach().float()).square().sum()) for a, b in pairs)
    return (moved / sum(float(a.detach().float().square().sum()) for a, _ in pairs)) ** 0.5
