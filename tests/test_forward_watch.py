"""Inputs of weights are seen whoever multiplies them, and whatever view or copy of them is multiplied."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from forward.parts import Use
from forward.watch import Watch


class Holder(nn.Module):
    """Parameters without a forward of their own."""

    def __init__(self, run: Callable[[Holder, Tensor], Any]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.arange(24.0).view(4, 6))  # [out, in]
        self.e = nn.Parameter(torch.arange(120.0).view(5, 4, 6))  # [experts, out, in]
        self.coarse = nn.Parameter(torch.randn(4, 6).bfloat16())
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def seen(run: Callable[[Holder, Tensor], Any], x: Tensor) -> list[tuple[Use, Tensor]]:
    """What a watch sees, with the inputs as rows."""
    found: list[tuple[Use, Tensor]] = []
    model = Holder(run)
    expected = model(x)
    watch = Watch(
        model,
        lambda use, value: found.append((use, value.reshape(-1, value.shape[-1]).clone())),
        products=["w", "e", "coarse"],
    )
    with torch.no_grad(), watch:
        got = model(x)
    if isinstance(expected, Tensor):
        assert torch.equal(got, expected)
    with torch.no_grad():
        model(x)
    assert watch.part_of(model.w) is None  # nothing is held afterwards
    return found


X = torch.randn(2, 3, 6)
WHOLE = Use("w", 1, ((0, 4), (0, 6)))


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: functional.linear(x, m.w),
        lambda m, x: functional.linear(input=x, weight=m.w),
        lambda m, x: x @ m.w.t(),
        lambda m, x: torch.matmul(x, m.w.mT),
        lambda m, x: torch.einsum("bti,oi->bto", x, m.w),
        lambda m, x: torch.tensordot(x, m.w, dims=([2], [1])),
        lambda m, x: m.w @ x.flatten(0, 1).t(),
        lambda m, x: torch.bmm(x, m.w.t().expand(2, 6, 4)),
        lambda m, x: torch.addmm(torch.zeros(4), x.flatten(0, 1), m.w.t()),
        lambda m, x: functional.linear(x, m.w.clone()),
        lambda m, x: functional.linear(x, m.w.t().contiguous().t()),
        lambda m, x: functional.linear(x.double(), m.w.to(torch.float64)),
        lambda m, x: functional.linear(x, m.w.view(2, 2, 6).flatten(0, 1)),
        lambda m, x: functional.linear(x, m.w.detach()),
    ],
)  # fmt: skip
def test_one_input_however_it_is_multiplied(run: Callable[[Holder, Tensor], Any]) -> None:
    ((use, rows),) = seen(run, X)
    assert use == WHOLE
    torch.testing.assert_close(rows.float(), X.reshape(-1, 6))


def test_slices_of_rows_and_of_channels() -> None:
    found = seen(lambda m, x: (functional.linear(x, m.w[:1]), functional.linear(x[..., :2], m.w[1:, 4:])), X)
    assert [use for use, _ in found] == [Use("w", 1, ((0, 1), (0, 6))), Use("w", 1, ((1, 4), (4, 6)))]
    assert torch.equal(found[1][1], X[..., :2].reshape(-1, 2))


def test_chunks_of_a_fused_weight() -> None:
    found = seen(lambda m, x: [functional.linear(x, part) for part in m.w.chunk(2)], X)
    assert [use.ranges[0] for use, _ in found] == [(0, 2), (2, 4)]


def test_experts_one_by_one_and_in_a_batch() -> None:
    def one_by_one(m: Holder, x: Tensor) -> None:
        for expert in (3, 1):
            functional.linear(x, m.e[expert])

    found = seen(one_by_one, X)
    assert [use for use, _ in found] == [Use("e", 2, ((expert, expert + 1), (0, 4), (0, 6))) for expert in (3, 1)]
    x = torch.randn(5, 2, 6)
    for run in (
        lambda m, x: torch.bmm(x, m.e.transpose(1, 2)),
        lambda m, x: torch.einsum("eti,eoi->eto", x, m.e),
        lambda m, x: x @ m.e.mT,
    ):
        found = seen(run, x)
        assert [use for use, _ in found] == [Use("e", 2, ((e, e + 1), (0, 4), (0, 6))) for e in range(5)]
        assert all(torch.equal(rows, x[e]) for e, (_, rows) in enumerate(found))
    found = seen(lambda m, x: torch.bmm(x, m.e), torch.randn(5, 2, 4))  # input first
    assert {use.axis for use, _ in found} == {1}


def test_groups_of_rows_or_of_channels_in_a_batch() -> None:
    """Block-diagonal layers: each group of a weight's rows, or of its channels, has an input of its own."""
    x = torch.randn(2, 5, 6)  # [groups, tokens, channels]
    for run in (
        lambda m, x: torch.bmm(x, m.w.view(2, 2, 6).transpose(1, 2)),
        lambda m, x: torch.einsum("gti,goi->gto", x, m.w.view(2, 2, 6)),
    ):
        found = seen(run, x)
        assert [use for use, _ in found] == [Use("w", 1, ((low, low + 2), (0, 6))) for low in (0, 2)]
        assert all(torch.equal(rows, x[group]) for group, (_, rows) in enumerate(found))
    x = torch.randn(3, 5, 2)
    found = seen(lambda m, x: torch.einsum("gti,ogi->gto", x, m.w.view(4, 3, 2)), x)
    assert [use for use, _ in found] == [Use("w", 1, ((0, 4), (low, low + 2))) for low in (0, 2, 4)]
    assert all(torch.equal(rows, x[group]) for group, (_, rows) in enumerate(found))


def test_all_experts_at_once_are_one_matrix() -> None:
    ((use, _),) = seen(lambda m, x: functional.linear(x, m.e.view(20, 6)), X)
    assert use == Use("e", 2, ((0, 5), (0, 4), (0, 6)))


def test_a_copy_in_another_dtype_is_the_parameter() -> None:
    ((use, _),) = seen(lambda m, x: functional.linear(x, m.coarse.float()), X)
    assert use.parameter == "coarse"


def test_products_of_other_tensors_are_not_seen() -> None:
    other = torch.randn(4, 6)
    assert not seen(lambda m, x: functional.linear(x, other), X)
    assert not seen(lambda m, x: functional.linear(x, m.w * 2), X)  # another weight, made of this one
    assert not seen(lambda m, x: m.w * x[0, :1, :6].expand(4, 6), X)  # no product of matrices


def test_a_copy_that_is_gone_is_not_mistaken_for_what_takes_its_memory() -> None:
    def run(m: Holder, x: Tensor) -> None:
        for _ in range(20):
            functional.linear(x, m.w.clone())
            functional.linear(x, torch.randn(4, 6))

    assert len(seen(run, X)) == 20


def test_the_head_is_not_computed() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 1000))
    found: list[Use] = []
    names = ["0.weight", "1.weight"]
    with torch.no_grad(), Watch(model, lambda use, x: found.append(use), products=names, head=model[1].weight):
        assert model(X).shape == (2, 3, 0)
    assert [use.parameter for use in found] == names


def test_a_module_that_is_in_two_places_is_seen_each_time() -> None:
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, shared)})
    found: list[Use] = []
    with torch.no_grad(), Watch(model, lambda use, x: found.append(use), products=["a.weight"]):
        model["b"](model["a"](X))
    assert [use.parameter for use in found] == ["a.weight"] * 3


@pytest.mark.parametrize("formula", ["btni,oni->bto", "btin,oni->bto"])
def test_input_channels_that_are_several_dimensions(formula: str) -> None:
    """In the order of the parameter's own dimensions, whichever way the product runs over them."""
    model = nn.ParameterDict({"e": nn.Parameter(torch.randn(5, 4, 6))})
    x = torch.randn(2, 3, *((4, 6) if "ni," in formula else (6, 4)))
    found: list[tuple[Use, Tensor]] = []
    with torch.no_grad(), Watch(model, lambda use, value: found.append((use, value.reshape(-1, 24).clone())), products=["e"]):  # fmt: skip
        torch.einsum(formula, x, model["e"])
    ((use, rows),) = found
    assert use == Use("e", 1, ((0, 5), (0, 4), (0, 6)), joined=2)
    assert (list(use.axes), use.channels) == ([1, 2], (0, 24))
    in_order = x if "ni," in formula else x.transpose(2, 3)
    assert torch.equal(rows, in_order.reshape(-1, 24))
    assert Use.of_json(json.loads(json.dumps(use.as_json()))) == use


@pytest.mark.parametrize("content", [3, [1, 2], ["w", "x", [[0, 1]], 1], ["w", 0, [[0]], 1], ["w", 1, [[0, 4]], 1], ["w", 0, [[0, 4]], 2]])  # fmt: skip
def test_what_is_no_use_is_refused(content: Any) -> None:
    with pytest.raises(ValueError, match=r"no use of a parameter|not enough values"):
        Use.of_json(content)


def test_a_parameter_of_another_model_is_looked_for_once(monkeypatch: pytest.MonkeyPatch):
    """Models that run in step see each other's products; where numbers are still to come, each would have all parameters looked at."""
    own, other = nn.Linear(4, 4, device="meta"), nn.Linear(4, 4)
    looked: list[int] = []
    find = Watch.find_parameters
    monkeypatch.setattr(Watch, "find_parameters", lambda self: looked.append(1) or find(self))
    seen: list[str] = []
    with Watch(own, lambda use, x: seen.append(use.parameter), products={"weight"}):
        for _ in range(5):
            other(torch.zeros(1, 4))
        assert len(looked) == 2
        own.weight = nn.Parameter(torch.zeros(4, 4))
        own.bias = nn.Parameter(torch.zeros(4))
        own(torch.zeros(1, 4))
    assert seen == ["weight"]
