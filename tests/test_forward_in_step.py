"""The pass by itself, as merging uses it: what a sink gets of one model and of several in step, whole and layer by layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import forward.skeleton
from forward.layerwise import Layerwise, in_step
from forward.loading import load
from forward.parts import Use
from forward.skeleton import build_skeleton
from forward.watch import Watch
from forward.whole import run_batches
from tests.aim_runs import make_family, open_folder, random_tokens

Inputs = dict[Use, list[Tensor]]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Architecture -> the folder of a pico base model."""
    return cache(lambda name: make_family(tmp_path_factory.mktemp(name), name, n_models=0).base)


class Counting:
    """Who is told what runs, as `forward.whole.Counts`; remembers it."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []

    @property
    def block(self) -> tuple[int, int] | None:
        return self.shapes[-1] if self.shapes else None

    @block.setter
    def block(self, shape: tuple[int, int] | None) -> None:
        if shape is not None:
            self.shapes.append(shape)


def fails(error: Exception) -> Exception:
    return error


def watched(model: Any, into: Inputs) -> Watch:
    """A watch of everything but embeddings that keeps the rows of all inputs."""
    tables = {id(one.weight) for one in model.modules() if isinstance(one, torch.nn.Embedding)}
    names = {name: one for name, one in model.named_parameters() if id(one) not in tables}

    def see(use: Use, x: Tensor) -> None:
        into.setdefault(use, []).append(x.detach().reshape(-1, x.shape[-1]).clone())

    return Watch(
        model,
        see,
        products=[name for name, one in names.items() if one.ndim > 1],
        vectors=[name for name, one in names.items() if one.ndim == 1 and name.endswith("weight")],
        head=model.get_output_embeddings().weight,
    )


def whole(folder: Path, tokens: Tensor) -> Inputs:
    """The inputs in a pass of the whole model."""
    model = load(open_folder(folder), dtype="float32")
    found: Inputs = {}
    with watched(model, found):
        for _ in run_batches(model, tokens, tokens.split(2), Counting(), fails):
            pass
    return found


def layered(stack: ExitStack, folder: Path, into: Inputs, counts: Counting | None = None) -> tuple[Layerwise, Any]:
    """A model that runs layer by layer, and its skeleton."""
    base = open_folder(folder)
    skeleton = build_skeleton(base, torch.float32)
    watch = stack.enter_context(watched(skeleton, into))
    return stack.enter_context(Layerwise(base, skeleton, CPU, watch=watch, counts=counts, fails=fails)), skeleton


def layer_of(use: Use) -> int | None:
    """The index of the layer that a weight is in."""
    found = re.search(r"\.(\d+)\.", use.parameter)
    return int(found[1]) if found else None


def check_same(found: Inputs, expected: Inputs) -> None:
    """Raise AssertionError where inputs are of other weights, or other than to rounding."""
    assert found.keys() == expected.keys()
    for use, inputs in expected.items():
        torch.testing.assert_close(torch.cat(found[use]), torch.cat(inputs), rtol=1e-5, atol=1e-5)


def test_two_models_in_step_on_two_texts_see_what_two_passes_see(base_of: Callable[[str], Path]) -> None:
    """Of each model the inputs of one layer at a time, all of its text, while no other layer's weights are there."""
    folders = [base_of("llama"), base_of("qwen3")]
    texts = [random_tokens(blocks=4, block_size=24, seed=1), random_tokens(blocks=3, block_size=40, seed=2)]
    inputs: list[Inputs] = [{}, {}]
    counts = [Counting(), Counting()]
    with ExitStack() as stack:
        models = [layered(stack, *one) for one in zip(folders, inputs, counts, strict=True)]
        for (layers, _), text in zip(models, texts, strict=True):
            layers.start(text.split(2))
        before: list[set[Use]] = [set(), set()]
        for at in in_step([layers for layers, _ in models]):
            for (layers, skeleton), seen, known in zip(models, inputs, before, strict=True):
                new = seen.keys() - known
                assert {layer_of(use) for use in new} - {None} == {at}
                known |= new
                names = [name for name, _ in layers.layers]
                assert all(one.is_meta for name in names for one in skeleton.get_submodule(name).parameters())
    for folder, text, seen in zip(folders, texts, inputs, strict=True):
        check_same(seen, whole(folder, text))
    assert set(counts[0].shapes) == {(2, 24)}
    assert set(counts[1].shapes) == {(2, 40), (1, 40)}


def test_a_pass_may_be_run_again_on_another_text(base_of: Callable[[str], Path]) -> None:
    texts = [random_tokens(blocks=2, block_size=16, seed=seed) for seed in (3, 4)]
    inputs: Inputs = {}
    with ExitStack() as stack:
        layers, _ = layered(stack, base_of("llama"), inputs)
        for text in texts:
            layers.run(text.split(1))
    check_same(inputs, whole(base_of("llama"), torch.cat(texts)))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each stored tensor is read whole."""
    counted: Counter[str] = Counter()
    read = forward.skeleton.read_tensor

    def count(weights: Any, name: str) -> Tensor:
        counted[name] += 1
        return read(weights, name)

    monkeypatch.setattr("forward.skeleton.read_tensor", count)
    return counted


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_each_weight_is_read_once_a_pass(
    architecture: str, base_of: Callable[[str], Path], reads: Counter[str]
) -> None:
    with ExitStack() as stack:
        layers, _ = layered(stack, base_of(architecture), {})
        layers.run(random_tokens(blocks=5, block_size=16).split(2))
    stored = set(open_folder(base_of(architecture)).weights.tensors)
    # Rows of the embedding are looked up, and the head's product is not computed.
    assert stored - reads.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    assert set(reads.values()) == {1}
