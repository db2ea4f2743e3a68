"""`reference` numerics: statistics with the published program's roundings, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import torch

from aim.activations import Key, Target, Watcher
from aim.statistics import ChannelStatistics


class ReferenceWatcher(Watcher):
    """Sums, over blocks, of the mean |x| of each block, both rounded to the model's dtype (bfloat16).

    Needs one block per forward pass. `mean_abs` of the results is that sum, not divided by the number of blocks, as in
    the program (it cancels); everything else is as in `Watcher`.
    Source: the AIM authors' program, commit e7eccd5.
    """

    def __init__(self, model: torch.nn.Module, targets: Mapping[str, Target]):
        super().__init__(model, targets)
        self._means: dict[Key, torch.Tensor] = {}

    def observe(self, key: Key, x: torch.Tensor) -> None:
        """See `Watcher.observe`."""
        super().observe(key, x)
        mean = x.detach().abs().reshape(-1, x.shape[-1]).mean(dim=0)
        self._means[key] = self._means[key].to(mean.device) + mean if key in self._means else mean

    def sums(self) -> dict[str, torch.Tensor]:
        """See `Watcher.sums`."""
        means = {json.dumps(key) + ".means": mean for key, mean in self._means.items()}
        return {**super().sums(), **means}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """See `Watcher.restore`."""
        super().restore(tensors)
        for name, mean in tensors.items():
            if name.endswith(".means"):
                module, parameter, expert = json.loads(name.removesuffix(".means"))
                self._means[module, parameter, expert] = mean

    def results(self) -> tuple[dict[str, ChannelStatistics], dict[str, str]]:
        """See `Watcher.results`."""
        found, silent = super().results()
        return {
            name: replace(one, mean_abs=self._means[self._targets[name].key(None)].float().cpu())
            for name, one in found.items()
        }, silent
