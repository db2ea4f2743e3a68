"""Three published ways to merge as prototypes, in memory: what each makes of the experts' task vectors at lambda 1.

    acm       ACM (2505.14009): each layer of a task vector times 1 - t, t = mean over texts of sigmoid(0.7 (MI - max MI)), MI being the mutual
              information of what the layer's MLP puts out in base and expert, every bfloat16 number a class of its own
    sens      Sens-Merging (2502.12420): each layer of a task vector times N softmax over the models of (alpha tau / 2), alpha being sums of
              |weight * gradient| by layer, of length 1 for each model, tau a model's share of how far logits are apart on all tasks
    one_bit   1bit-Merging (2502.10743), of which the quantiser alone is certain: each matrix's task vector becomes its mean |d| times its signs

`acm_permuted` and `sens_permuted` have the same factors at other layers, `one_bit_mlp` quantises the MLP's matrices alone. ACM and Sens-Merging are
read from programs of others, not from their papers (docs/methods.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from examples.real.losses import answers
from examples.real.texts import Encoded

TEXTS = 16
"""Documents of each expert's training text that are looked at."""
THETA, TEMPERATURE = 0.7, 2.0
PROTOTYPES = ("acm", "acm_permuted", "sens", "sens_permuted", "one_bit", "one_bit_mlp")
_LAYER = re.compile(r"\.layers\.(\d+)\.")

Changes = Mapping[str, Tensor]


def changes(name: str, base: Any, experts: Sequence[Any], texts: Sequence[Sequence[Encoded]]) -> Changes:
    """What a prototype adds to the base's weights at lambda 1.

    Args:
        name: one of `PROTOTYPES`.
        base: the base.
        experts: models, on the same device.
        texts: of each expert, from its training.
    """
    start = dict(base.named_parameters())
    vectors = [{key: (own - start[key]).detach() for key, own in expert.named_parameters()} for expert in experts]
    if name.startswith("one_bit"):
        kinds = ("mlp",) if name.endswith("mlp") else ("mlp", "self_attn")
        return {
            key: torch.stack(
                [one_bit(one[key]) if one[key].ndim == 2 and any(kind in key for kind in kinds) else one[key] for one in vectors]
            ).sum(dim=0)
            for key in start
        }  # fmt: skip
    few = [list(own[:TEXTS]) for own in texts]
    factors = acm_factors(base, experts, few) if name.startswith("acm") else sens_factors(experts, few)
    if name.endswith("permuted"):
        factors = factors[:, torch.randperm(factors.shape[1], generator=torch.Generator().manual_seed(0))]
    return {key: _scaled(key, [one[key] for one in vectors], factors) for key in start}


def _scaled(key: str, vectors: Sequence[Tensor], factors: Tensor) -> Tensor:
    """The sum of a tensor's task vectors, each times its layer's factor; outside of layers times the mean of all layers'."""
    layer = _LAYER.search(key)
    own = factors[:, int(layer[1])] if layer else factors.mean(dim=1)
    return torch.stack([vector * float(factor) for vector, factor in zip(vectors, own, strict=True)]).sum(dim=0)


def one_bit(vector: Tensor) -> Tensor:
    """A task vector's mean size with its signs, that of 0 being +."""
    return torch.where(vector < 0, -1.0, 1.0) * vector.abs().mean()


# --------------------------------------------------------------------------------------------------------------- ACM


def acm_factors(base: Any, experts: Sequence[Any], texts: Sequence[Sequence[Encoded]]) -> Tensor:
    """1 - t of each expert's layers on its own text, `[experts, layers]` float64."""
    found = []
    for expert, own in zip(experts, texts, strict=True):
        shared = []
        for document in own:
            pairs = zip(_outputs(base, document), _outputs(expert, document), strict=True)
            shared.append([mutual_information(*pair) for pair in pairs])
        found.append(acm_shares(torch.tensor(shared, dtype=torch.float64)))
    return torch.stack(found)


def acm_shares(shared: Tensor) -> Tensor:
    """1 - t of mutual informations `[texts, layers]`: `[layers]`."""
    return 1 - torch.sigmoid(THETA * (shared - shared.max(dim=0).values)).mean(dim=0)


def mutual_information(one: Tensor, other: Tensor) -> float:
    """Of pairs of numbers, in nats; every bfloat16 number is a class of its own."""
    left, right = (values.flatten().to(torch.bfloat16).view(torch.int16).long() & 0xFFFF for values in (one, other))

    def entropy(classes: Tensor) -> float:
        shares = torch.unique(classes, return_counts=True)[1].double() / classes.numel()
        return float(-(shares * shares.log()).sum())

    return entropy(left) + entropy(right) - entropy(left << 16 | right)


@torch.no_grad()
def _outputs(model: Any, document: Encoded) -> list[Tensor]:
    """What the MLP of each layer puts out for a document."""
    found: list[Tensor] = []
    handles = [
        layer.mlp.down_proj.register_forward_hook(lambda module, args, output: found.append(output))
        for layer in model.model.layers
    ]
    try:
        model(torch.tensor([document.prompt + document.answer], device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


# ------------------------------------------------------------------------------------------------------ Sens-Merging


def sens_factors(experts: Sequence[Any], texts: Sequence[Sequence[Encoded]]) -> Tensor:
    """N sigma of each expert's layers, `[experts, layers]` float64."""
    alpha = torch.stack([_sensitivity(expert, own) for expert, own in zip(experts, texts, strict=True)])
    apart = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    with torch.no_grad():
        for task, own in enumerate(texts):
            for document in own:
                ids = torch.tensor([document.prompt + document.answer], device=experts[0].device)
                logits = [expert(ids, use_cache=False).logits for expert in experts]
                for model, mine in enumerate(logits):
                    apart[model, task] += float((mine - logits[task]).abs().mean()) / len(own)
    return sens_shares(alpha, apart.sum(dim=1) / apart.sum())


def sens_shares(alpha: Tensor, tau: Tensor) -> Tensor:
    """N softmax over the models of alpha tau / T; alpha `[models, layers]`, tau `[models]`."""
    unit = alpha / torch.linalg.vector_norm(alpha, dim=1, keepdim=True)
    return len(alpha) * torch.softmax(unit * tau[:, None] / TEMPERATURE, dim=0)


def _sensitivity(expert: Any, texts: Sequence[Encoded]) -> Tensor:
    """Sums of |weight * gradient| over a layer's weights, mean over texts, `[layers]` float64."""
    found = torch.zeros(len(expert.model.layers), dtype=torch.float64)
    for document in texts:
        answers(expert, [document]).losses.mean().backward()
        for index, layer in enumerate(expert.model.layers):
            found[index] += sum(float((weight * weight.grad).abs().sum()) for weight in layer.parameters())
        expert.zero_grad(set_to_none=True)
    return found / len(texts)
