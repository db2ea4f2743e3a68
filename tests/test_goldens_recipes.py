"""Every golden from its own mergekit config through `merge.py --config`, and once more from what that wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

import merge
from merging.methods import dare, della
from streaming.elements import Tensors
from tests.golden_files import (
    Golden,
    golden,
    golden_names,
    share_within_ulp,
    trim_is_ambiguous,
    ulp_distance,
)
from tests.in_memory import InMemory, make_method
from tests.scene import call, read_tensors

RANDOM = [name for name in golden_names() if golden(name).seed is not None and min(golden(name).densities) < 1]
FIXED = [name for name in golden_names() if name not in RANDOM]
BY_SUMS = ("slerp", "nuslerp", "karcher", "model_stock")
SMALL = 100
"""Elements below which mergekit's breadcrumbs of gamma 0.01 lose a task vector, and ours do not."""


def config_of(of: Golden) -> dict[str, Any]:
    """Its own config, as this program says it."""
    return {"tokenizer_source": "base", **of.config} if of.name in CUT else of.config


def merge_golden(
    of: Golden, config: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *flags: str
) -> dict[str, Tensor]:
    """Merge as the command does, where the folders of the config are."""
    monkeypatch.chdir(of.inputs)
    call(merge, "--config", config, "--save_path", out, "--quiet", *flags)
    return read_tensors(out)


def write(config: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


# mergekit sums the models of a union in the order of a Python set; one element differs for it by one step of bfloat16.
OTHER_ORDER = {("pad_union_ta_f32", "model.embed_tokens.weight"): (136, 40)}


# mergekit 0.1.4 cuts tables to the base's rows; a file that says nothing of tokenizers keeps the tokens that models add here.
CUT = {name for name in golden_names() if name.startswith("pad_") and "tokenizer" not in golden(name).config}


def unclear(of: Golden, name: str, merged: Tensor) -> Tensor | None:
    """Where mergekit's unstable sort decides about equal magnitudes, or the order of a Python set."""
    if (of.name, name) in OTHER_ORDER:
        found = torch.zeros(merged.shape, dtype=torch.bool)
        found[OTHER_ORDER[of.name, name]] = True
        return found
    if of.method not in ("ties", "breadcrumbs", "breadcrumbs_ties"):
        return None
    inputs = of.load_inputs()
    base, models = inputs["base"][name], [inputs[model][name] for model in of.models]
    found = trim_is_ambiguous(base, models, of.densities, of.dtype)
    if of.method != "ties":
        gammas = [entry["parameters"].get("gamma", 0.01) for entry in of.config["models"]]
        n = base.numel()
        top = [min(int(gamma * n), n - int(rho * n)) / n for gamma, rho in zip(gammas, of.densities, strict=True)]
        with_top = [share + int(rho * n) / n for share, rho in zip(top, of.densities, strict=True)]
        for shares in (top, with_top):  # a hair more, so that the product is that whole number again
            found |= trim_is_ambiguous(base, models, [share + 1e-9 for share in shares], of.dtype)
    return found


@pytest.mark.parametrize("name", FIXED)
def test_a_golden_comes_out_of_its_own_config(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    of = golden(name)
    merged = merge_golden(of, write(config_of(of), tmp_path / "recipe.yml"), tmp_path / "out", monkeypatch)
    assert sorted(merged) == sorted(of.hashes)
    near = far = differ = total = 0.0
    for tensor, (_, dtype, shape) in of.hashes.items():
        ours = merged[tensor]
        assert (str(ours.dtype), tuple(ours.shape)) == (f"torch.{dtype}", shape)
        if name == "breadcrumbs_d09_gdefault" and ours.numel() < SMALL:
            continue
        allow = unclear(of, tensor, ours)
        if of.is_bitwise and of.method not in (*BY_SUMS, "sce"):
            of.check(tensor, ours, allow=allow)
        elif tensor in of.kept:
            rows = of.rows[tensor]
            clear = torch.ones_like(of.kept[tensor], dtype=torch.bool) if allow is None else ~allow[rows]
            distance = ulp_distance(ours[rows], of.kept[tensor])[clear]
            near += int((distance <= 1).sum())
            differ += int((distance > 0).sum())
            far += int((distance > 1).sum())
            total += distance.numel()
    if of.is_bitwise and of.method in BY_SUMS:
        assert far <= 0.001 * total
    elif of.is_bitwise and of.method == "sce":
        assert differ <= 0.001 * total
    elif not of.is_bitwise:
        assert near >= 0.98 * total
    again = merge_golden(of, tmp_path / "out" / "merge_recipe.json", tmp_path / "again", monkeypatch)
    assert again.keys() == merged.keys()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("name", RANDOM)
def test_a_random_golden_from_its_own_config(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Other draws, so statistics alone: as much is kept, and the merge is as far from the base."""
    of = golden(name)
    config = write(config_of(of), tmp_path / "recipe.yml")
    merged = merge_golden(of, config, tmp_path / "out", monkeypatch, "--seed", str(of.seed))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == _again(of, tmp_path, monkeypatch)
    base = of.load_inputs()["base"]
    ours = theirs = 0.0
    for tensor, rows in of.rows.items():
        if base[tensor].dim() < 2:
            continue
        start = base[tensor][rows].double()
        ours += (merged[tensor][rows].double() - start).norm().item() ** 2
        theirs += (of.kept[tensor].double() - start).norm().item() ** 2
    assert ours**0.5 == pytest.approx(theirs**0.5, rel=0.2)


def _again(of: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    merge_golden(of, tmp_path / "out" / "merge_recipe.json", tmp_path / "again", monkeypatch)
    return (tmp_path / "again" / "model.safetensors").read_bytes()


def reference_draws(of: Golden) -> Iterator[tuple[str, list[Tensor]]]:
    """mergekit's own masks: one generator, tensors by name, then models in order; della's by rank in the row."""
    generator = torch.Generator().manual_seed(of.seed or 0)
    inputs = of.load_inputs()
    for name in sorted(of.hashes):
        masks = []
        for index, (model, rho) in enumerate(zip(of.models, of.densities, strict=True)):
            dtype = torch.bfloat16 if of.dtype == torch.bfloat16 else torch.float32
            probability = torch.full(of.hashes[name].shape, rho, dtype=dtype)
            if of.method.startswith("della"):
                epsilon = of.config["models"][index]["parameters"].get("epsilon", 0.15)
                d = inputs[model][name].float() - inputs["base"][name].float()
                magnitudes = d.abs().reshape(-1, d.shape[-1])
                ranks = torch.argsort(magnitudes, dim=1).argsort(dim=1).float() + 1
                lowest, highest = ranks.amin(dim=1, keepdim=True), ranks.amax(dim=1, keepdim=True)
                place = ((ranks - lowest) / (highest - lowest)).clamp(0, 1)
                probability = ((rho - epsilon) + place * 2 * epsilon).reshape(d.shape)
            masks.append(torch.bernoulli(probability, generator=generator).bool())
        yield name, masks


@pytest.mark.parametrize("name", RANDOM)
def test_the_methods_with_mergekits_own_draws(name: str, monkeypatch: pytest.MonkeyPatch):
    """Everything but the draw is ours: the l1 rule, the election, the sums."""
    of = golden(name)
    inputs = of.load_inputs()
    rescale = of.config.get("parameters", {}).get("rescale", True)
    arguments = {"weights": of.weights, "density": of.densities, "lambda_": of.lambda_, "normalize": of.normalize}
    method = make_method(of.method, len(of.models), rescale=rescale, **arguments)
    near = total = 0.0
    for tensor, masks in reference_draws(of):

        def drop_(
            values: Tensor, *_: Any, model: int, start: int, masks: list[Tensor] = masks, **unused: Any
        ) -> Tensor:
            return values.mul_(masks[model].flatten()[start : start + values.numel()])

        def drop_by_rank_(values: Tensor, *given: Any, drop_: Any = drop_) -> Tensor:
            columns, _, keys_of, start = given
            drop_(values, model=keys_of.args[-1], start=start)
            kept = drop_(torch.ones_like(values), model=keys_of.args[-1], start=start).view(-1, columns)
            return torch.from_numpy(np.packbits(kept.bool().numpy(), axis=1, bitorder="little"))

        def drop(x: Tensors, values: Tensor, *_: Any, model: int, drop_: Any = drop_, **unused: Any) -> Tensor:
            return drop_(values.clone(), model=model, start=x.region.start)

        monkeypatch.setattr(dare, "drop", drop)
        monkeypatch.setattr(della, "drop_by_rank_", drop_by_rank_)
        if tensor not in of.rows:
            continue
        memory = InMemory(inputs["base"][tensor], [inputs[model][tensor] for model in of.models], tensor)
        expected = of.kept[tensor]
        ours = memory.merge(method)[of.rows[tensor]].to(expected.dtype)
        if of.dtype == torch.float32:
            tolerance = 1e-6 if expected.dtype == torch.float32 else 2**-8
            torch.testing.assert_close(ours, expected, rtol=tolerance, atol=1e-7)
        near += share_within_ulp(ours, expected) * expected.numel()
        total += expected.numel()
    if of.dtype != torch.float32:
        assert near / total >= 0.98
