"""The engine against the outputs of the reference programs, as NUMERICS.md says they are to be compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alignment.layout import Layout
from merging import RunOptions, make_recipe, merge
from merging.methods import get_method
from streaming.blocks import Block, Region, TensorSpec
from tests.golden_files import (
    Golden,
    authors_masks,
    bernoulli_masks,
    golden,
    golden_names,
    relative_error,
    share_within_ulp,
    trim_is_ambiguous,
)

FLAGS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
BY_COMMAND = [
    name
    for name in golden_names("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")
    if "rescale" not in golden(name).config.get("parameters", {})
    and (golden(name).seed is None or min(golden(name).densities) == 1)
]
# mergekit sums the models of a union in the order of a Python set; one element differs for it by one step of bfloat16.
OTHER_ORDER = {("pad_union_ta_f32", "model.embed_tokens.weight"): (136, 40)}
RANDOM = [name for name in golden_names("dare_linear", "dare_ties") if golden(name).seed is not None]


def merge_like(reference: Golden, folder: Path) -> dict[str, torch.Tensor]:
    """Run the recipe of a golden through the engine; the tensors of the output."""
    uses = get_method(reference.method).parameters()
    parameters = {
        "weight": ",".join(map(repr, reference.weights)),
        "density": ",".join(map(repr, reference.densities)) if "density" in uses else None,
        "lambda": reference.lambda_ if "lambda" in uses else None,
        "normalize": reference.normalize,
    }
    recipe = make_recipe(
        reference.method,
        str(reference.inputs / "base"),
        ",".join(str(reference.inputs / model) for model in reference.models),
        parameters=parameters,
        out_dtype=next(iter(reference.hashes.values())).dtype,
        layout=Layout(tokenizer_source=reference.config.get("tokenizer_source", "base")),
    )
    merge(recipe, folder / "out", RunOptions(quiet=True))
    return load_file(folder / "out" / "model.safetensors")


def comparable_inputs(reference: Golden, name: str, rows: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The base's tensor and the models', cut to the output's rows."""
    inputs = reference.load_inputs()
    return inputs["base"][name][:rows], [inputs[model][name][:rows] for model in reference.models]


@pytest.mark.parametrize("name", BY_COMMAND)
def test_merge_agrees_with_the_reference_program(name: str, tmp_path: Path) -> None:
    reference = golden(name)
    merged = merge_like(reference, tmp_path)
    assert sorted(merged) == sorted(reference.hashes)
    near = total = 0.0
    for tensor, (_, _, shape) in reference.hashes.items():
        if reference.is_bitwise:
            ambiguous = None
            if reference.method == "ties":
                base, models = comparable_inputs(reference, tensor, shape[0])
                ambiguous = trim_is_ambiguous(base, models, reference.densities, reference.dtype)
            if (name, tensor) in OTHER_ORDER:
                row, column = OTHER_ORDER[name, tensor]
                ambiguous = torch.zeros(shape, dtype=torch.bool)
                ambiguous[row, column] = True
            reference.check(tensor, merged[tensor], allow=ambiguous)
        elif tensor in reference.kept:
            rows, expected = reference.rows[tensor], reference.kept[tensor]
            base, models = comparable_inputs(reference, tensor, shape[0])
            ambiguous = trim_is_ambiguous(base, models, reference.densities, reference.dtype)[rows]
            count = int((~ambiguous).sum())
            near += share_within_ulp(merged[tensor][rows], expected, ignore=ambiguous) * count
            total += count
    if not reference.is_bitwise:
        assert near / total >= 0.98, f"{name}: {near / total:.4f} of the elements are within one unit in the last place"


def test_every_golden_of_these_methods_is_compared_somewhere() -> None:
    elsewhere = {
        "f32_ties_d04_rescale",
        "ties_d04_rescale",
    }  # recipes of a later kind; test_reference.py
    assert {*BY_COMMAND, *RANDOM, *elsewhere} == set(
        golden_names("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")
    )


@pytest.mark.parametrize("name", RANDOM)
def test_dare_with_the_masks_of_the_reference_program(name: str) -> None:
    """The method's own functions on mergekit's draws and its l1 rescale, in place of ours."""
    reference = golden(name)
    inputs = reference.load_inputs()
    shapes = {tensor: entry.shape for tensor, entry in reference.hashes.items()}
    masks = bernoulli_masks(reference.seed or 0, shapes, reference.densities, reference.dtype)
    plain = get_method(reference.method)(
        weights=tuple(reference.weights),
        densities=(1.0,) * 3,
        lambda_=reference.lambda_,
        normalize=reference.normalize,
        seed=0,
    )
    near = total = 0.0
    for tensor, rows in reference.rows.items():
        base = inputs["base"][tensor].float()
        vectors = []
        for model, mask in zip(reference.models, masks[tensor], strict=True):
            delta = inputs[model][tensor].float() - base
            kept = delta * mask
            if reference.rescale == "l1":
                kept *= delta.abs().sum() / kept.abs().sum()
            vectors.append(kept.flatten())
        region = Region(TensorSpec(tensor, tuple(base.shape)), 0, base.numel())
        merged = plain.combine(Block(region, base.flatten(), vectors, []), None).view(base.shape)
        expected = reference.kept[tensor]
        if reference.dtype == torch.float32:
            tolerance = 1e-6 if expected.dtype == torch.float32 else 2**-8
            torch.testing.assert_close(merged[rows].to(expected.dtype), expected, rtol=tolerance, atol=1e-7)
        near += share_within_ulp(merged[rows].to(expected.dtype), expected) * expected.numel()
        total += expected.numel()
    if reference.dtype != torch.float32:
        assert near / total >= 0.98


def test_dare_drops_and_rescales_as_its_authors_do() -> None:
    """`authors_mask_merging`: 1 / density, summed; the masks are the authors' own draws."""
    reference = golden("authors_mask_merging", family="aim")
    inputs = reference.load_inputs()
    masks = authors_masks(reference)
    method = get_method("task_arithmetic")(weights=(1.0,) * 3, lambda_=1.0, normalize=False)
    near = total = 0.0
    for tensor, rows in reference.rows.items():
        base = inputs["base"][tensor].float()
        vectors = [
            ((inputs[model][tensor].float() - base) * mask / 0.5).flatten()
            for model, mask in zip(reference.models, masks[tensor], strict=True)
        ]
        region = Region(TensorSpec(tensor, tuple(base.shape)), 0, base.numel())
        merged = method.combine(Block(region, base.flatten(), vectors, []), None).view(base.shape)
        expected = reference.kept[tensor]
        near += share_within_ulp(merged[rows].bfloat16(), expected) * expected.numel()
        total += expected.numel()
    assert near / total >= 0.98


def test_widen_agrees_with_its_authors_program(tmp_path: Path) -> None:
    reference = golden("widen_f32load", family="aim")
    inputs = reference.inputs
    recipe = make_recipe(
        "WIDEN", str(inputs / "base"), ",".join(str(inputs / m) for m in reference.models), out_dtype="float32"
    )
    merge(recipe, tmp_path / "out", RunOptions(quiet=True))
    merged = load_file(tmp_path / "out" / "model.safetensors")
    base = reference.load_inputs()["base"]
    assert sorted(merged) == sorted(reference.hashes)
    for tensor, rows in reference.rows.items():
        ours, theirs = (
            merged[tensor][rows] - base[tensor][rows].float(),
            reference.kept[tensor] - base[tensor][rows].float(),
        )
        assert relative_error(ours, theirs) <= 1e-2, tensor
