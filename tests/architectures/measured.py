"""What each number of a model's weights is multiplied with, measured without names, modules, strides or hooks.

All numbers of a tiny model differ. So whoever sees an operand of a matrix product sees by its numbers which elements of which
parameter it has, whatever view, copy or join of them it is; and the other operand is what these elements are multiplied with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

Array = np.ndarray[Any, Any]
UNKNOWN = -1
ENOUGH = 0.98
"""Share of an operand's numbers that must be a parameter's; padding is not."""
ATEN = torch.ops.aten


class Measured(TorchDispatchMode):
    """Sums of |x| for every element of every parameter, over all products that the model makes in the context.

    Args:
        model: float32, of `tests.architectures.tiny`. Embeddings count as inputs, not as weights.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()  # type: ignore[no-untyped-call]
        tables = {id(one.weight) for one in model.modules() if isinstance(one, torch.nn.Embedding)}
        parameters = [one for one in model.parameters() if one.is_floating_point() and one.numel()]
        numbers = np.concatenate([one.detach().float().flatten().numpy() for one in parameters])
        is_table = np.concatenate([np.full(one.numel(), id(one) in tables) for one in parameters])
        self._order = np.argsort(numbers, kind="stable")
        self._sorted = numbers[self._order]
        self._is_table = is_table
        self.sums = np.zeros(len(numbers))
        """Of |x|, by place."""
        self.rows = np.zeros(len(numbers))
        """How many, by place."""

    def places(self, values: torch.Tensor) -> Array:
        """Where numbers stand among all parameters', `UNKNOWN` for those that are none's; of the same shape."""
        wanted = values.detach().float().numpy()
        at = np.minimum(np.searchsorted(self._sorted, wanted), len(self._sorted) - 1)
        return np.where(self._sorted[at] == wanted, self._order[at], UNKNOWN)

    def _weight(self, operand: torch.Tensor) -> Array | None:
        """The places of an operand's numbers; None where it is no weight."""
        if not operand.is_floating_point() or not operand.numel():
            return None
        few = self.places(operand.flatten()[:4])
        if (few == UNKNOWN).all():
            return None
        places = self.places(operand)
        known = places != UNKNOWN
        return places if known.mean() >= ENOUGH and not self._is_table[places[known]].all() else None

    def _product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """`[batch, n, k] x [batch, k, m]`, of which one is a weight; two are taken for an input and a weight, in this order."""
        places, x = self._weight(right), left
        if places is None:
            left_places = self._weight(left)
            if left_places is None:
                return
            places, x = left_places.transpose(0, 2, 1), right.transpose(1, 2)
        sums = x.detach().double().abs().sum(dim=1).numpy()  # [batch, k]
        whose = places.reshape(-1)
        known = whose != UNKNOWN
        np.add.at(self.sums, whose[known], np.broadcast_to(sums[:, :, None], places.shape).reshape(-1)[known])
        np.add.at(self.rows, whose[known], x.shape[1])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet is ATEN.mm:
            self._product(args[0][None], args[1][None])
        elif packet is ATEN.addmm:
            self._product(args[1][None], args[2][None])
        elif packet is ATEN.bmm:
            self._product(args[0], args[1])
        elif packet is ATEN.baddbmm:
            self._product(args[1], args[2])
        elif packet is ATEN.mv:
            self._product(args[0][None], args[1][None, :, None])
        elif packet is ATEN.addmv:
            self._product(args[1][None], args[2][None, :, None])
        return func(*args, **(kwargs or {}))

    def means(self, stored: torch.Tensor, dims: Sequence[int], *, by_matrix: bool) -> torch.Tensor | None:
        """Mean |x| of each input channel of a stored tensor, `[in]` or `[matrices, in]` float64; 0 where nothing came; None where no
        product has any of it.

        Args:
            stored: found by its numbers.
            dims: its dimensions that run over input channels.
            by_matrix: apart for each index of its first dimension.
        """
        places = self.places(stored)
        known = places != UNKNOWN
        sums, rows = (np.where(known, of[np.maximum(places, 0)], 0.0) for of in (self.sums, self.rows))
        if not rows.any():
            return None
        others = tuple(axis for axis in range(stored.ndim) if axis not in {*dims, *([0] if by_matrix else [])})
        sums, rows = sums.sum(axis=others), rows.sum(axis=others)
        means = torch.from_numpy(np.where(rows > 0, sums / np.maximum(rows, 1), 0.0))
        return means if by_matrix else means.flatten()

    def is_multiplied(self, stored: torch.Tensor) -> bool:
        """Whether a product has any of a stored tensor that is no embedding."""
        places = self.places(stored).reshape(-1)
        places = places[places != UNKNOWN]
        return bool(len(places)) and bool((self.rows[places] > 0).any()) and not self._is_table[places].all()
