"""First tokens of inputs whose rows do not tell: run by themselves, where that says anything; means over all rows stay what they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from aim.watcher import Target, Watcher
from forward.loading import CannotRun

BLOCKS, LENGTH, WIDTH = 3, 5, 4


class Model(nn.Module):
    """A matrix that sees every token, and one that sees them picked, as an expert does; a token's state is its own, or the block's mean.

    Args:
        looks_ahead: whether it does not read from left to right.
        needs: as many tokens as it fails below.
    """

    def __init__(self, *, looks_ahead: bool, needs: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, WIDTH)
        self.all = nn.Linear(WIDTH, WIDTH, bias=False)
        self.picked = nn.Linear(WIDTH, WIDTH, bias=False)
        self.looks_ahead, self.needs = looks_ahead, needs

    def states(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return x + x.mean(dim=1, keepdim=True) if self.looks_ahead else x

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] < self.needs:
            raise CannotRun("too short")
        x = self.all(self.states(tokens))
        return self.picked(x.flatten(0, 1)[tokens.flatten() % 2 == 1])


def watch(model: Model, tokens: Tensor) -> Watcher:
    watcher = Watcher(model, {f"{name}.weight": Target(f"{name}.weight", (0, 1), (WIDTH, WIDTH)) for name in ("all", "picked")})  # fmt: skip
    with torch.no_grad(), watcher.watching():
        watcher.block = (BLOCKS, LENGTH)
        model(tokens)
        assert not watcher.knows_first_tokens
        with watcher.first_tokens():
            watcher.block = (BLOCKS, 1)
            model(tokens[:, :1])
    return watcher


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(20, (BLOCKS, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("looks_ahead", [False, True])
@pytest.mark.parametrize("needs", [1, 2])
def test_means_over_all_rows_are_exact_whatever_the_first_tokens_say(
    looks_ahead: bool, needs: int, tokens: Tensor
) -> None:
    model = Model(looks_ahead=looks_ahead, needs=needs)
    statistics, _, _ = watch(model, tokens).results()
    with torch.no_grad():
        rows = model.all(model.states(tokens)).flatten(0, 1)[tokens.flatten() % 2 == 1]
    torch.testing.assert_close(statistics["picked.weight"].mean_abs, rows.abs().mean(dim=0))
    known = statistics["picked.weight"].after_first
    assert (known is not None) == (not looks_ahead and needs == 1)
    if known is not None:
        later = rows[(torch.arange(BLOCKS * LENGTH) % LENGTH > 0)[tokens.flatten() % 2 == 1]]
        torch.testing.assert_close(known.mean_abs, later.abs().mean(dim=0))
        assert int(known.tokens) == len(later) < len(rows)
    assert statistics["all.weight"].after_first is not None
