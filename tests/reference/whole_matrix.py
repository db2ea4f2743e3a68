"""What the references of methods that merge whole matrices have in common: everything else is summed up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.reference import of_method


def is_rest(base: Tensor, is_embedding: bool, is_head: bool) -> bool:
    """Whether a tensor is no matrix of a layer."""
    return base.ndim < 2 or is_embedding or is_head or not base.numel()


def summed(base: Tensor, models: Sequence[Tensor], rest_lambda: float) -> Tensor:
    """b + rest_lambda sum d_i, float64."""
    return base.double() + rest_lambda * sum((model.float() - base.float()).double() for model in models)


def float32_slack(base: Tensor, models: Sequence[Tensor], result: Tensor) -> Tensor:
    """The merged task vector, times lambda, plus the base, or all that is added up."""
    reach = torch.stack([(model.float() - base.float()).double().abs() for model in models]).sum(dim=0)
    return 8 * of_method.FLOAT32_STEP * (reach + (result - base.double()).abs() + base.double().abs())


def with_head(method: Any, tensor: Any, base: Tensor, models: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The one name that the families of these tests have for a head."""
    return arguments | {"is_head": tensor.name == "lm_head.weight"}
