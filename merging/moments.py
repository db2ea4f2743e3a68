"""Second moments of what a model's weights are multiplied with, added up while the model runs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from checkpoints.placements import Placement
from forward.parts import Use
from merging.methods.regmean import InputMoments

ROWS_AT_ONCE = 4096
"""Of an input that are kept before they are multiplied: one product of many rows costs far less than many of few."""


@dataclass(frozen=True)
class _Rows:
    """An input that was seen, whichever weights share it.

    Attributes:
        x, version: as it came; holding it keeps its memory from being reused.
        rest, first: copies of its rows: all but those of the first token, and those.
    """

    x: torch.Tensor
    version: int
    rest: torch.Tensor
    first: torch.Tensor


@dataclass
class _Sum:
    """Sums over tokens of one use of a weight.

    Attributes:
        waiting: inputs that are not in the sums yet.
        rest, first: of x x^T, `[in, in]` float64, or of x^2, `[in]`, over tokens after the first of a document, and over first ones;
            never changed, so that uses of one input share them.
        tokens, firsts: how many are in them.
    """

    waiting: list[_Rows]
    rest: torch.Tensor
    first: torch.Tensor
    tokens: int = 0
    firsts: int = 0


class Moments:
    """Adds up x x^T of the inputs that a `forward.watch.Watch` sees.

    Args:
        diagonal: parameters of whose inputs x^2 is enough.

    Attributes:
        block: `(documents, tokens)` of what runs; see `forward.whole.Counts`.
        is_open: whether what is seen counts.
    """

    def __init__(self, diagonal: Collection[str] = ()):
        self.block: tuple[int, int] | None = None
        self.is_open = True
        self._diagonal = frozenset(diagonal)
        self._sums: dict[Use, _Sum] = {}
        self._last: _Rows | None = None
        self._multiplied: dict[tuple[bool, tuple[int, ...]], tuple[list[_Rows], torch.Tensor, torch.Tensor]] = {}
        self._means: dict[tuple[int, ...], tuple[list[torch.Tensor], InputMoments]] = {}

    def see(self, use: Use, x: torch.Tensor) -> None:
        """See `forward.watch.See`. An input that several weights share is multiplied once."""
        if not self.is_open:
            return
        if self._last is None or self._last.x is not x or self._last.version != x._version:
            rows = x.detach().reshape(-1, x.shape[-1])
            firsts = len(rows) // self.block[1] if self.block and x.ndim > 1 and self._is_in_order(x) else 0
            # One document at a time runs, so that the first token's rows come first.
            self._last = _Rows(x, x._version, rows[firsts:].clone(), rows[:firsts].clone())
        if use not in self._sums:
            width = x.shape[-1]
            zeros = torch.zeros(
                width if use.parameter in self._diagonal else (width, width), dtype=torch.float64, device=x.device
            )
            self._sums[use] = _Sum([], zeros, zeros)
        sums = self._sums[use]
        sums.waiting.append(self._last)
        if sum(len(one.rest) for one in sums.waiting) >= ROWS_AT_ONCE:
            self._add_up(use)

    def _add_up(self, use: Use) -> None:
        """Put what waits of a use into its sums."""
        sums = self._sums[use]
        if not sums.waiting:
            return
        key = (use.parameter in self._diagonal, tuple(map(id, sums.waiting)))
        if key not in self._multiplied:
            rest, first = (torch.cat(rows).double() for rows in zip(*((one.rest, one.first) for one in sums.waiting), strict=True))  # fmt: skip
            made = [rows.square().sum(dim=0) if key[0] else rows.T @ rows for rows in (rest, first)]
            self._multiplied = {
                key: (sums.waiting, made[0], made[1])
            }  # the last alone: uses of one input come together
        _, rest, first = self._multiplied[key]
        is_new = not sums.tokens and not sums.firsts
        sums.rest, sums.first = (rest, first) if is_new else (sums.rest + rest, sums.first + first)
        sums.tokens += sum(len(one.rest) for one in sums.waiting)
        sums.firsts += sum(len(one.first) for one in sums.waiting)
        sums.waiting = []

    def _is_in_order(self, x: torch.Tensor) -> bool:
        """Whether the rows of an input are those of the tokens, in their order."""
        assert self.block is not None
        documents, length = self.block
        return tuple(x.shape[:2]) == (documents, length) if x.ndim > 2 else len(x) == documents * length

    def clear(self) -> None:
        """Forget what was added up."""
        self._sums.clear()
        self._multiplied.clear()
        self._means.clear()
        self._last = None

    def of(self, placement: Placement, shape: Sequence[int]) -> InputMoments | None:
        """The moments of a stored tensor's input, the same object for weights of one input; None where none was seen that has all of
        its channels.

        Args:
            placement: of the tensor.
            shape: its own.
        """
        if placement.input_dim is None or placement.input_dim not in placement.axes:
            return None
        axis, width = placement.axes.index(placement.input_dim), shape[placement.input_dim]
        uses = [
            use
            for use in self._sums
            if use.parameter == placement.parameter and use.axis == axis and use.channels == (0, width)
        ]
        if not uses:
            return None
        for use in self._sums:  # in the order of the pass, where weights of one input stand together
            self._add_up(use)
        self._multiplied.clear()
        if placement.kind != "experts":
            return self._mean([self._sums[use] for use in uses])
        # A router's rows do not tell which of them are first tokens, whatever they were for one document.
        experts = [placement.expert] if placement.expert is not None else list(range(shape[0]))
        each = [
            self._joined([self._sums[use] for use in uses if _has(use, expert)], self._sums[uses[0]])
            for expert in experts
        ]
        return InputMoments(torch.stack(each), torch.zeros_like(torch.stack(each))) if placement.expert is None else (
            InputMoments(each[0], torch.zeros_like(each[0]))
        )  # fmt: skip

    def _mean(self, sums: Sequence[_Sum]) -> InputMoments:
        """Means of several sums together."""
        whole = [moments.rest for moments in sums]
        key = tuple(map(id, whole))
        if key not in self._means:
            tokens, firsts = sum(moments.tokens for moments in sums), sum(moments.firsts for moments in sums)
            rest = torch.stack(whole).sum(dim=0) / max(1, tokens)
            first = torch.stack([moments.first for moments in sums]).sum(dim=0) / max(1, firsts)
            self._means[key] = (whole, InputMoments(rest, first))  # as long as they are there, no other has their id
        return self._means[key][1]

    @staticmethod
    def _joined(sums: Sequence[_Sum], like: _Sum) -> torch.Tensor:
        """The mean over all tokens of several sums together; zeros, shaped like those of another, of none."""
        if not sums:
            return torch.zeros_like(like.rest)
        total = torch.stack([moments.rest + moments.first for moments in sums]).sum(dim=0)
        return total / max(1, sum(moments.tokens + moments.firsts for moments in sums))


def _has(use: Use, expert: int) -> bool:
    return use.ranges[0][0] <= expert < use.ranges[0][1]
