"""Methods that merge each matrix of the layers as a whole, with a factorisation; all else is task arithmetic."""

from __future__ import annotations

import threading
from abc import abstractmethod
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import torch

from merging.methods.contract import Method
from merging.methods.linear import weighted_sum
from merging.methods.task_arithmetic import add_to_base
from streaming import blocks
from streaming.blocks import Block, Region, Scan, TensorSpec, tile

_ONE_AT_A_TIME = threading.Lock()
"""Several tensors are at work at once; of what a matrix needs while it is factorised there is never more than one."""


@dataclass(frozen=True)
class WholeMatrix(Method):
    """Merge a matrix by a function of all of it, in float64.

    A method says what it gathers of a block, and what it makes of that; its fields `lambda_` and `rest_lambda` are what the merged matrix
    is multiplied with, and the sum of the task vectors of everything else: vectors, embeddings, the head.
    More than two dimensions are a stack of matrices. A NaN or an infinity that was let through makes its whole matrix NaN.
    """

    needs_embeddings: ClassVar[bool] = True

    lambda_: float
    rest_lambda: float

    @abstractmethod
    def gather(self, task_vectors: torch.Tensor) -> torch.Tensor:
        """What to keep of the task vectors at some elements, element by element: `[models, n]` float32 -> `[k, n]`, new."""

    @abstractmethod
    def merge_matrices(self, gathered: torch.Tensor) -> torch.Tensor:
        """The merged task vectors of some matrices, all finite: `[k, matrices, rows, columns]` as gathered -> `[matrices, rows, columns]` float64."""

    def measure(self, tensor: TensorSpec, scan: Scan) -> torch.Tensor | None:
        """The merged task vector, `[matrices, rows, columns]` float32 on the CPU; None where the tensor is no matrix of this method."""
        if tensor.is_vector or tensor.is_embedding or tensor.is_head or not tensor.numel:
            return None
        merged = torch.empty(tensor.matrices, tensor.rows, tensor.columns)
        # The grid's regions, those of each matrix together: small matrices come several in a region, large ones in several regions.
        for first, group in groupby(tile(tensor, blocks.GRID_ELEMENTS), key=lambda region: region.matrix_range[0]):
            with _ONE_AT_A_TIME:
                gathered = self._read(scan, list(group))
                broken = ~gathered.isfinite().all(dim=-1).all(dim=-1).all(dim=0)
                gathered[:, broken] = 0.0
                part = self.merge_matrices(gathered)
                part[broken] = torch.nan
                merged[first : first + len(part)] = part
        return merged

    def _read(self, scan: Scan, regions: list[Region]) -> torch.Tensor:
        """What is gathered of the matrices that the regions fill, `[k, matrices, rows, columns]`."""
        rows, columns = regions[0].tensor.rows, regions[0].tensor.columns
        begin, end = regions[0].start, regions[-1].stop
        whole: torch.Tensor | None = None

        def gather(block: Block) -> tuple[Region, torch.Tensor]:
            return block.region, self.gather(torch.stack(block.task_vectors))

        for region, part in scan(gather, regions):
            if whole is None:
                whole = part.new_empty(len(part), end - begin)
            whole[:, region.start - begin : region.stop - begin] = part
        assert whole is not None
        return whole.view(len(whole), -1, rows, columns)

    def combine(self, block: Block, statistics: torch.Tensor | None) -> torch.Tensor:
        """See `Method.combine`."""
        assert block.base is not None
        if statistics is None:
            total = weighted_sum(block.task_vectors, [1.0] * len(block.task_vectors))
            return add_to_base(block.base, total, self.rest_lambda)
        here = statistics.view(-1)[block.region.start : block.region.stop]
        return add_to_base(block.base, here.to(block.base.device, copy=True), self.lambda_)
