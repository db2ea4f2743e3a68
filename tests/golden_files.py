"""The goldens in tests/goldens: load one, and say whether a tensor of ours agrees with it.

A golden is what a real reference program wrote for one recipe. Of every tensor it has the digest, of a few the values:

    golden = golden("ties_d05_w_f32")                      # or golden("widen_f32load", family="aim")
    sources = golden.load_inputs()                         # {"base": {name: tensor}, "math": ..., ...}
    golden.check("model.norm.weight", ours)                # bit for bit, or AssertionError

How strictly: float32 recipes bit for bit, except where a trimming threshold falls between equal magnitudes
(`trim_is_ambiguous`); bf16 recipes nearly everywhere within one unit in the last place (`share_within_ulp`); random
recipes with the golden's own masks (`bernoulli_masks`).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDENS = Path(__file__).parent / "goldens"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
NORMALIZE_DEFAULT = {"linear": True, "ties": True, "della": True}
RESCALE_DEFAULT = {"dare_linear": True, "dare_ties": True, "della": True, "della_linear": True}


class GoldenHash(NamedTuple):
    """What the index says of one whole tensor."""

    sha16: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Golden:
    """One output of a reference program.

    Attributes:
        name, family: "ties_d05", "mergekit"; "widen_f32load", "aim".
        config: the mergekit recipe, or what the aim index says (omega, merged, models). Models are folders of `inputs`.
        seed: of the random methods; None where nothing is drawn.
        inputs: the folder that holds the models of the recipe.
        kept: the stored values, whole tensors or a range of their rows.
        rows: for each name in `kept`, the rows of the whole tensor that are stored.
        hashes: for each output tensor its digest, dtype and shape.
    """

    name: str
    family: str
    config: dict[str, Any]
    seed: int | None
    inputs: Path
    kept: dict[str, Tensor]
    rows: dict[str, slice]
    hashes: dict[str, GoldenHash]

    @property
    def method(self) -> str:
        """The merge method; in the aim family the first word of the name ("aim", "authors", "widen")."""
        return self.config.get("merge_method", self.name.split("_")[0])

    @property
    def models(self) -> list[str]:
        """The fine-tuned models, in order, without the base."""
        if self.family == "aim":
            return ["math", "code", "instruct"]
        return [entry["model"] for entry in self.config["models"]]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the reference computed in."""
        if self.family == "aim":
            return torch.float32 if "f32" in self.name else torch.bfloat16
        return DTYPES[self.config["dtype"]]

    @property
    def weights(self) -> list[float]:
        return self._per_model("weight", 1.0)

    @property
    def densities(self) -> list[float]:
        return self._per_model("density", 1.0)

    @property
    def lambda_(self) -> float:
        return self.config.get("parameters", {}).get("lambda", 1.0)

    @property
    def normalize(self) -> bool:
        return self.config.get("parameters", {}).get("normalize", NORMALIZE_DEFAULT.get(self.method, False))

    @property
    def rescale(self) -> str | None:
        """ "l1" where mergekit rescales after dropping or trimming, else None."""
        asked = self.config.get("parameters", {}).get("rescale", RESCALE_DEFAULT.get(self.method, False))
        return "l1" if asked else None

    @property
    def is_bitwise(self) -> bool:
        """Whether float32 arithmetic has to give these very bits (thresholds that fall on ties aside)."""
        return self.dtype == torch.float32 and (self.seed is None or min(self.densities) == 1)

    def _per_model(self, key: str, default: float) -> list[float]:
        return [entry.get("parameters", {}).get(key, default) for entry in self.config["models"]]

    def load_inputs(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of "base" and of every model of the recipe."""
        return {name: load_tensors(self.inputs / name) for name in ["base", *self.models]}

    def check(self, tensor_name: str, actual: Tensor, allow: Tensor | None = None) -> None:
        """Compare one whole output tensor of ours, bit for bit: with the digest, and with the stored rows if any.

        Args:
            tensor_name: a key of `hashes`.
            actual: the whole tensor.
            allow: bool, shape of `actual`: where it may differ. The digest is compared only if that is nowhere.
        Raises: AssertionError, naming golden and tensor.
        """
        where = f"{self.name}: {tensor_name}"
        sha16, dtype, shape = self.hashes[tensor_name]
        assert (str(actual.dtype), tuple(actual.shape)) == (f"torch.{dtype}", shape), (
            f"{where}: expected {dtype} {shape}, got {actual.dtype} {tuple(actual.shape)}"
        )
        if tensor_name in self.kept:
            rows = self.rows[tensor_name]
            part = None if allow is None else allow[rows]
            assert_same_bits(actual[rows], self.kept[tensor_name], allow=part, where=where)
        if allow is None or not allow.any():
            assert tensor_sha16(actual) == sha16, f"{where}: other bytes than the golden's, outside the stored rows"


def golden(name: str, family: str = "mergekit") -> Golden:
    """Load one golden: its recipe, the stored values, the digests of all tensors."""
    entry = _index(family)[name]
    hashes = {key: GoldenHash(sha, dtype, tuple(shape)) for key, (sha, dtype, shape) in entry["tensors"].items()}
    kept = load_file(GOLDENS / family / f"{name}.safetensors")
    rows = {key: _stored_rows(key, kept[key].shape[0], hashes[key].shape[0]) for key in kept}
    config = entry.get("config", {key: value for key, value in entry.items() if key != "tensors"})
    inputs = GOLDENS / "inputs" / ("f32" if name.startswith("f32_") else "")
    return Golden(name, family, config, entry.get("seed"), inputs, kept, rows, hashes)


def golden_names(*methods: str, family: str = "mergekit") -> list[str]:
    """The names of all goldens of these methods (of every method if none is given), sorted: for parametrize."""
    return sorted(
        name
        for name, entry in _index(family).items()
        if not methods or entry.get("config", {}).get("merge_method") in methods
    )


@functools.cache
def goldens_by_method() -> dict[str, list[str]]:
    """Every merge method of the mergekit family with the names of its goldens."""
    methods = sorted({entry["config"]["merge_method"] for entry in _index("mergekit").values()})
    return {method: golden_names(method) for method in methods}


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a one-file checkpoint, read by the safetensors library and not by code of ours."""
    return load_file(folder / "model.safetensors")


@functools.cache
def _index(family: str) -> dict[str, Any]:
    paths = [GOLDENS / family / "index.json", GOLDENS / family / "index_f32.json"]
    entries: dict[str, Any] = {}
    for path in paths:
        if path.exists():
            entries |= json.loads(path.read_text())
    return entries


def _stored_rows(name: str, stored: int, whole: int) -> slice:
    """Of lm_head the last rows are stored, of everything else the first ones."""
    return slice(whole - stored, whole) if name == "lm_head.weight" else slice(0, stored)


# Comparing


def tensor_sha16(tensor: Tensor) -> str:
    """The first 16 hex digits of the sha256 of the tensor's raw little-endian bytes."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:16]


def bits(tensor: Tensor) -> Tensor:
    """The same bytes as integers, same shape."""
    return tensor.contiguous().view(INTEGER_OF_SIZE[tensor.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor, allow: Tensor | None = None, where: str = "tensor") -> None:
    """Same dtype, same shape, same bits (so -0.0 is not 0.0), except where `allow` is True.

    Raises: AssertionError with the number of differing elements and the first of them.
    """
    got, wanted = (str(actual.dtype), tuple(actual.shape)), (str(expected.dtype), tuple(expected.shape))
    assert got == wanted, f"{where}: expected {wanted}, got {got}"
    differs = bits(actual) != bits(expected)
    if allow is not None:
        differs &= ~allow
    if differs.any():
        first = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{where}: {int(differs.sum())} of {differs.numel()} elements differ, the first at {first}: "
            f"expected {expected[first].item()!r}, got {actual[first].item()!r}"
        )


def ulp_distance(actual: Tensor, expected: Tensor) -> Tensor:
    """How many representable numbers lie between each pair (int64; 0.0 and -0.0 are the same number)."""
    assert actual.dtype == expected.dtype, f"expected {expected.dtype}, got {actual.dtype}"
    return (_ordered(actual) - _ordered(expected)).abs()


def share_within_ulp(actual: Tensor, expected: Tensor, ulps: int = 1, ignore: Tensor | None = None) -> float:
    """The share of elements at most `ulps` units in the last place apart (1.0 for an empty tensor).

    Args:
        actual, expected: same shape and dtype, usually bfloat16.
        ignore: bool, same shape: elements left out of the count.
    """
    assert actual.shape == expected.shape, f"expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}"
    near = ulp_distance(actual, expected) <= ulps
    if ignore is not None:
        near = near[~ignore]
    return near.double().mean().item() if near.numel() else 1.0


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`, in float64."""
    difference = (actual.double() - expected.double()).norm().item()
    norm = expected.double().norm().item()
    return difference / norm if norm else float(difference > 0)


def trim_is_ambiguous(base: Tensor, models: Iterable[Tensor], densities: Iterable[float], dtype: torch.dtype) -> Tensor:
    """Where |d_i| of some model equals its trimming threshold and only some of those equals are kept.

    There the reference programs follow the order of an unstable sort, and we keep the lower indices.

    Args:
        base, models: whole tensors, same shape.
        densities: fraction kept, one for each model.
        dtype: what the reference rounds task vectors to. We do not round them to bf16, so for bf16 recipes everything
            at the threshold of the rounded ones counts.
    Returns: bool, the shape of `base`.
    """
    ambiguous = torch.zeros(base.shape, dtype=torch.bool)
    for model, density in zip(models, densities, strict=True):
        magnitude = (model.to(dtype) - base.to(dtype)).float().abs()
        keep = int(density * magnitude.numel())
        if not 0 < keep < magnitude.numel():
            continue
        threshold = magnitude.flatten().kthvalue(magnitude.numel() - keep + 1).values
        if dtype != torch.float32 or (magnitude >= threshold).sum() > keep:
            ambiguous |= magnitude == threshold
    return ambiguous


def bernoulli_masks(
    seed: int, shapes: Mapping[str, Sequence[int]], densities: Sequence[float], dtype: torch.dtype = torch.float32
) -> dict[str, list[Tensor | None]]:
    """The masks that mergekit drew for a `dare_*` recipe: one global generator, tensors by name, then models in order.

    Args:
        seed: of the recipe.
        shapes: of every output tensor of the recipe, for the draws depend on all that came before.
        densities: fraction kept, one for each model; a model of density 1 draws nothing and has None.
        dtype: of the recipe; bf16 rounds the density itself.
    Returns: for every tensor a list of bool masks, True where an element is kept.
    """
    generator = torch.Generator().manual_seed(seed)
    mask_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32

    def draw(shape: Sequence[int], density: float) -> Tensor | None:
        if density >= 1:
            return None
        return torch.bernoulli(torch.full(tuple(shape), density, dtype=mask_dtype), generator=generator).bool()

    return {name: [draw(shapes[name], density) for density in densities] for name in sorted(shapes)}


def authors_masks(of: Golden) -> dict[str, list[Tensor]]:
    """The masks of `authors_mask_merging`: seed 0, rate 0.5, model by model, tensors in the order of the modules.

    Returns: for every tensor a bool mask of each model, True where an element is kept.
    """
    parts = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    parts += ["input_layernorm", "post_attention_layernorm"]
    layers = [f"model.layers.{layer}.{part}.weight" for layer in (0, 1) for part in parts]
    order = ["model.embed_tokens.weight", *layers, "model.norm.weight", "lm_head.weight"]
    generator = torch.Generator().manual_seed(0)
    masks: dict[str, list[Tensor]] = {name: [] for name in order}
    for _ in of.models:
        for name in order:
            dropped = torch.bernoulli(torch.full(of.hashes[name].shape, 0.5), generator=generator)
            masks[name].append(dropped == 0)
    return masks


def _ordered(tensor: Tensor) -> Tensor:
    """Integers in the order of the numbers, neighbours 1 apart."""
    raw = bits(tensor).to(torch.int64)
    lowest = -(1 << (8 * tensor.element_size() - 1))
    return torch.where(raw < 0, lowest - raw, raw)
