"""`reference` numerics: statistics with the published program's roundings, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from aim.activations import ChannelStatistics
from aim.watcher import OTHERS, Watcher
from forward.parts import Use


class ReferenceWatcher(Watcher):
    """Sums, over blocks, of the mean |x| of each block, both rounded to the model's dtype (bfloat16).

    Needs one block per forward pass. `mean_abs` of the results is that sum, not divided by the number of blocks, as in
    the program (it cancels); everything else is as in `Watcher`.
    Source: the AIM authors' program, commit e7eccd5.
    """

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self._means: dict[str, torch.Tensor] = {}

    def observe(self, use: Use, x: torch.Tensor) -> None:
        """See `Watcher.observe`."""
        super().observe(use, x)
        if self._only_first:
            return
        mean = x.detach().abs().reshape(-1, x.shape[-1]).mean(dim=0)
        name = use.parameter
        self._means[name] = self._means[name].to(mean.device) + mean if name in self._means else mean

    def sums(self) -> dict[str, torch.Tensor]:
        """See `Watcher.sums`."""
        return {**super().sums(), **{OTHERS + name: mean for name, mean in self._means.items()}}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """See `Watcher.restore`."""
        super().restore({name: tensor for name, tensor in tensors.items() if not name.startswith(OTHERS)})
        self._means |= {name[len(OTHERS) :]: tensor for name, tensor in tensors.items() if name.startswith(OTHERS)}

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """See `Watcher.add`; the roundings are those of one process where each has had one block."""
        super().add({name: tensor for name, tensor in tensors.items() if not name.startswith(OTHERS)})
        for name, mean in tensors.items():
            if name.startswith(OTHERS):
                own = self._means.get(name[len(OTHERS) :])
                self._means[name[len(OTHERS) :]] = mean if own is None else own + mean.to(own.device)

    def forget(self) -> None:
        """See `Watcher.forget`."""
        super().forget()
        self._means.clear()

    def results(self) -> tuple[dict[str, ChannelStatistics], dict[str, int], dict[str, str]]:
        """See `Watcher.results`."""
        statistics, dims, silent = super().results()
        means = {name: self._means[self._names[self._targets[name].parameter]] for name in statistics}
        return (
            {name: replace(channels, mean_abs=means[name].float().cpu()) for name, channels in statistics.items()},
            dims,
            silent,
        )
