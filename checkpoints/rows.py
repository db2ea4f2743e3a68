"""Sources of vocabulary tables: rows in another order, rows that a model lacks, and mean rows."""

from __future__ import annotations

import bisect
import functools
import threading
from collections.abc import Mapping, Sequence

import torch

from checkpoints.source import READ_ELEMENTS, Source, TensorInfo, TensorRef
from checkpoints.vocabulary import MISSING


class AlignedRows:
    """A source of vocabulary tables that have the rows of one model where it has them, and those of a fallback elsewhere.

    Fallbacks may be such sources themselves: the base's rows, else the first model's, else the second's, and so on.

    Args:
        tables: output name -> the model's table.
        fallback: gives the rows that the model lacks, under the output names and already in the output's order.
        row_of: per output row the row of the model, or `MISSING`; `[out_rows]` int64.
    """

    def __init__(self, tables: Mapping[str, TensorRef], fallback: Source, row_of: torch.Tensor):
        self.label = next(iter(tables.values())).source.label
        self._tables = tables
        self._fallback = fallback
        self._starts, self._source_rows = cut_into_runs(row_of)
        self._rows = len(row_of)
        lacks_some = bool((row_of == MISSING).any())
        self.tensors: Mapping[str, TensorInfo] = {
            name: self._aligned_info(name, len(row_of), lacks_some) for name in tables
        }

    def _aligned_info(self, name: str, rows: int, lacks_some: bool) -> TensorInfo:
        """With the dtype that holds the rows of both sources without rounding."""
        info = self._tables[name].info
        other = self._fallback.tensors[name].dtype if lacks_some else info.dtype
        return TensorInfo(torch.promote_types(info.dtype, other), (rows, *info.shape[1:]))

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """See `Source.read`; one read of the model's table for each run of rows that lie together there."""
        info = self.tensors[name]
        width = info.numel // info.shape[0]
        scratch = torch.empty_like(buffer)
        out = buffer[: (stop - start) * info.dtype.itemsize].view(info.dtype)
        rows = torch.tensor([start // width, (stop - 1) // width])
        first, last = (torch.searchsorted(self._starts, rows, right=True) - 1).tolist()
        begins = self._starts[first : last + 1].tolist()
        ends = [*begins[1:], self._rows]
        for begin, end, source_row in zip(begins, ends, self._source_rows[first : last + 1].tolist(), strict=True):
            low, high = max(start, begin * width), min(stop, end * width)
            if source_row == MISSING:
                values = self._fallback.read(name, low, high, scratch)
            else:
                shift = (source_row - begin) * width
                values = self._tables[name].read(low + shift, high + shift, scratch)
            out[low - start : high - start].copy_(values)
        return out


class ChosenRows:
    """A source of vocabulary tables some of whose rows are other ones.

    Args:
        tables: output name -> table, in the output's rows.
        chosen: output row -> for each output name the table and the row there that it gets; None for zeros.
    """

    def __init__(
        self, tables: Mapping[str, TensorRef], chosen: Mapping[int, Mapping[str, tuple[TensorRef, int]] | None]
    ):
        self.label = next(iter(tables.values())).source.label
        self._tables, self._chosen, self._rows = tables, chosen, sorted(chosen)
        self.tensors: Mapping[str, TensorInfo] = {name: self._info(name) for name in tables}

    def _info(self, name: str) -> TensorInfo:
        """With the dtype that holds all rows without rounding."""
        info = self._tables[name].info
        others = [rows[name][0].info.dtype for rows in self._chosen.values() if rows is not None]
        return TensorInfo(functools.reduce(torch.promote_types, others, info.dtype), info.shape, info.plain_dtype)

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """See `Source.read`."""
        info = self.tensors[name]
        width = info.numel // info.shape[0]
        scratch = torch.empty_like(buffer)
        out = buffer[: (stop - start) * info.dtype.itemsize].view(info.dtype)
        out.copy_(self._tables[name].read(start, stop, scratch))
        first, last = (bisect.bisect_left(self._rows, row) for row in (start // width, -(-stop // width)))
        for row in self._rows[first:last]:
            low, high = max(start, row * width), min(stop, (row + 1) * width)
            source = self._chosen[row]
            if source is None:
                out[low - start : high - start] = 0
                continue
            table, there = source[name]
            shift = (there - row) * width
            out[low - start : high - start].copy_(table.read(low + shift, high + shift, scratch))
        return out


class MeanRows:
    """A source whose every row of a table is the mean of the rows that a model has, rounded to the table's dtype.

    Args:
        tables: output name -> the model's table, of at least one row.
    """

    def __init__(self, tables: Mapping[str, TensorRef]):
        self.label = next(iter(tables.values())).source.label
        self.tensors: Mapping[str, TensorInfo] = {name: table.info for name, table in tables.items()}
        self._tables = tables
        self._rows: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """See `Source.read`; rows beyond the table are the same too."""
        with self._lock:  # on first use: a plan may have the headers of a hub model and none of its numbers
            if name not in self._rows:
                self._rows[name] = mean_row(self._tables[name])
        row = self._rows[name]
        return row[torch.arange(start, stop) % len(row)]


class MeanOfOwners:
    """A source whose every row of a table is the mean of that row in all models that have it, in float32.

    Args:
        owners: of each model its tables, output name -> table, and per output row its row or `MISSING`, `[rows]` int64; at
            least one.
        fallback: gives the rows that none of them has.
    """

    def __init__(self, owners: Sequence[tuple[Mapping[str, TensorRef], torch.Tensor]], fallback: Source):
        self.label = fallback.label
        self._fallback = fallback
        rows = len(owners[0][1])
        self._counts = torch.stack([row_of != MISSING for _, row_of in owners]).sum(dim=0)  # [rows]
        self._owners = [(AlignedRows(tables, fallback, row_of), row_of) for tables, row_of in owners]
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(torch.float32, (rows, *table.info.shape[1:])) for name, table in owners[0][0].items()
        }

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """See `Source.read`; sums in float64, in the order of the models."""
        info = self.tensors[name]
        width = info.numel // info.shape[0]
        row = torch.arange(start, stop) // width
        counts = self._counts[row]
        total = torch.zeros(stop - start, dtype=torch.float64)
        scratch = torch.empty_like(buffer)
        for source, row_of in self._owners:
            has = row_of[row] != MISSING
            if has.any():
                total += torch.where(has, source.read(name, start, stop, scratch).double(), 0.0)
        mean = total / counts.clamp(min=1)
        if (counts == 0).any():
            mean = torch.where(counts > 0, mean, self._fallback.read(name, start, stop, scratch).double())
        return mean.float()


def mean_row(table: TensorRef) -> torch.Tensor:
    """Mean of a table's rows, summed in float64 and rounded to its dtype: `[columns]`."""
    info = table.info
    width = info.numel // info.shape[0]
    rows_each = max(1, READ_ELEMENTS // width)
    buffer = torch.empty(rows_each * width * 8, dtype=torch.uint8)
    total = torch.zeros(width, dtype=torch.float64)
    for first in range(0, info.shape[0], rows_each):
        last = min(first + rows_each, info.shape[0])
        total += table.read(first * width, last * width, buffer).view(-1, width).double().sum(dim=0)
    return (total / info.shape[0]).float().to(info.dtype)


def cut_into_runs(row_of: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut a row map `[rows]` where it stops counting upwards.

    Returns: the first output row of each run, and the model's row that it starts at or `MISSING`; both `[runs]` int64.
    """
    if not len(row_of):
        return row_of, row_of
    steps = row_of[1:] - row_of[:-1]
    missing = row_of == MISSING
    goes_on = ((steps == 1) & ~missing[:-1]) | (missing[1:] & missing[:-1])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.nonzero(~goes_on).flatten() + 1])
    return starts, row_of[starts]
