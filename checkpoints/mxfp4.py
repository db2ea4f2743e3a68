"""MXFP4 weights of gpt-oss, read as the bfloat16 numbers that they stand for, in the layout of the plain model.

    NAME_blocks   [experts, rows, columns / 32, 16] uint8   two e2m1 numbers a byte, the low four bits first
    NAME_scales   [experts, rows, columns / 32]     uint8   32 numbers share a factor 2^(scale - 127)
    NAME          [experts, columns, rows]          bfloat16, as it is read: each expert's matrix transposed

Every product is a bfloat16 number: nothing is rounded. One expert's bytes are kept at a time for each thread or so, and of them only what is
asked for is decoded.

Source: OCP Microscaling Formats 1.0; the layout is that of transformers 5.19, `integrations/mxfp4.py`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from checkpoints.dequantise import DecodedWeights
from checkpoints.problems import Problems
from checkpoints.reader import Checkpoint
from checkpoints.source import MXFP4_BLOCKS, TensorInfo, is_mxfp4

GROUP = 32
"""Numbers that share a scale."""
CACHED_EXPERTS = 4
"""Packed matrices of experts in memory; consecutive reads stay within one."""

_SCALES = "_scales"
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NIBBLES = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
# [256, 2] float32: the two numbers of a byte, the low four bits' first.
_OF_BYTE = torch.stack([_NIBBLES.repeat(16), _NIBBLES.repeat_interleave(16)], dim=1)
# [256] float32: the factor of a scale.
_OF_SCALE = torch.ldexp(torch.ones(256), torch.arange(256) - 127)


class _Expert(NamedTuple):
    """One expert's matrix as stored: `[rows, columns / 2]` and `[rows, columns / 32]` uint8."""

    packed: torch.Tensor
    scales: torch.Tensor


class Mxfp4Weights(DecodedWeights):
    """A checkpoint whose MXFP4 tensors are decoded as they are read; a `Weights`.

    Raises: Refusals: blocks without scales, or of shapes that do not fit together.
    """

    def __init__(self, inner: Checkpoint):
        super().__init__(inner)
        infos = dict(inner.tensors)
        problems = Problems()
        self._packed: set[str] = set()
        for name, info in inner.tensors.items():
            if not is_mxfp4(name, info):
                continue
            plain = name.removesuffix(MXFP4_BLOCKS)
            scales = infos.pop(plain + _SCALES, None)
            del infos[name]
            if scales is None:
                problems.add(
                    f"{self.label}: {name}: expected {plain}{_SCALES} beside it, got none. Use the unquantised model."
                )
            elif plain in infos:
                problems.add(
                    f"{self.label}: {plain}: expected it once, got it as {plain} and as {name}. Remove one of them."
                )
            elif not (
                len(info.shape) == 4
                and info.shape[-1] == GROUP // 2
                and (scales.shape, scales.dtype) == (info.shape[:-1], torch.uint8)
            ):
                problems.add(
                    f"{self.label}: {name}: expected shape [experts, rows, groups, {GROUP // 2}] and uint8 scales [experts, rows, groups], "
                    f"got {list(info.shape)} and {list(scales.shape)}. Use the unquantised model."
                )
            else:
                experts, rows, groups, _ = info.shape
                infos[plain] = TensorInfo(torch.bfloat16, (experts, groups * GROUP, rows))
                self._packed.add(plain)
        problems.raise_if_any()
        self.tensors = dict(sorted(infos.items()))
        self._expert = lru_cache(CACHED_EXPERTS)(self._read_expert)

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """See `Source.read`."""
        if name not in self._packed:
            return self._inner.read(name, start, stop, buffer)
        out = buffer[: 2 * (stop - start)].view(torch.bfloat16)
        _, columns, rows = self.tensors[name].shape
        size = columns * rows
        for number in range(start // size, -(-stop // size)):
            begin = number * size
            first, last = max(start - begin, 0), min(stop - begin, size)
            column = first // rows
            numbers = _decode(self._expert(name, number), column, -(-last // rows)).T.reshape(-1)
            out[first + begin - start : last + begin - start] = numbers[first - column * rows : last - column * rows]
        return out

    def _read_expert(self, name: str, number: int) -> _Expert:
        """One expert's bytes."""
        _, columns, rows = self.tensors[name].shape
        parts = []
        for end, width in ((MXFP4_BLOCKS, columns // 2), (_SCALES, columns // GROUP)):
            count = rows * width
            buffer = torch.empty(8 * count, dtype=torch.uint8)
            read = self._inner.read(name + end, number * count, (number + 1) * count, buffer)
            parts.append(read.clone().view(rows, width))
        return _Expert(*parts)


def _decode(expert: _Expert, start: int, stop: int) -> torch.Tensor:
    """The columns `start` to `stop` of an expert's matrix as stored: `[rows, stop - start]` float32."""
    first, last = start // 2, -(-stop // 2)
    numbers = _OF_BYTE[expert.packed[:, first:last].int()].flatten(1)[:, start - 2 * first : stop - 2 * first]
    scales = _OF_SCALE[expert.scales.int()[:, torch.arange(start, stop) // GROUP]]
    return numbers * scales
