"""Tiny models of transformers' classes: configs that say only what has to be small, and numbers of which no two are equal."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

CONFIGS = Path(__file__).with_name("configs.jsonl")
FIRST_TOKEN, LAST_TOKEN = 8, 264
"""Ids that are a word in every tiny model: special tokens, and those that stand for images, are outside."""
BLOCKS, BLOCK_SIZE = 4, 32
KINDS = {"causal": "causal", "image": "image and text", "seq2seq": "encoder and decoder", "masked": "masked"}
"""Kinds of classes, by the mapping of transformers that they are in -> as people call them."""


@dataclass(frozen=True)
class Tiny:
    """A class of transformers, and what makes it tiny.

    Attributes:
        kind: a key of `KINDS`.
        model_type: as transformers calls the family.
        name: the class.
        config: what differs from the config class's own defaults.
    """

    kind: str
    model_type: str
    name: str
    config: dict[str, Any]

    def build(self, seed: int = 0) -> Any:
        """The model, float32, all of whose parameters' numbers differ from each other."""
        import transformers

        build: Any = getattr(transformers, self.name)
        torch.manual_seed(seed)
        model = build(build.config_class(**json.loads(json.dumps(self.config)))).eval()
        make_unique(model, seed)
        return model


@cache
def tiny_models() -> tuple[Tiny, ...]:
    """All of them, in transformers' order."""
    rows = [json.loads(line) for line in CONFIGS.read_text(encoding="utf-8").splitlines()]
    return tuple(Tiny(row["kind"], row["type"], row["class"], row["config"]) for row in rows)


def tokens(seed: int = 0) -> torch.Tensor:
    """`[BLOCKS, BLOCK_SIZE]` ids."""
    shape, generator = (BLOCKS, BLOCK_SIZE), torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_TOKEN, LAST_TOKEN, shape, generator=generator)


def make_unique(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter numbers near those that it has, all different and none 0, so that a number says where it is from."""
    generator = torch.Generator().manual_seed(seed + 1)
    parameters = [one for one in model.parameters() if one.is_floating_point() and one.numel()]
    flat = torch.cat([one.detach().float().flatten() for one in parameters])
    flat = flat * (1 + 0.1 * torch.randn(flat.shape, generator=generator))
    flat += 0.02 * torch.randn(flat.shape, generator=generator)
    while True:
        ordered, order = flat.sort()
        twins = order[1:][ordered[1:] == ordered[:-1]]
        twins = torch.cat([twins, (flat == 0).nonzero().flatten()])
        if not len(twins):
            break
        flat[twins] += 0.001 * torch.randn(len(twins), generator=generator)
    with torch.no_grad():
        for one, numbers in zip(parameters, flat.split([one.numel() for one in parameters]), strict=True):
            one.copy_(numbers.view(one.shape))
