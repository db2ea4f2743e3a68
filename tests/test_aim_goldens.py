"""AIM against the outputs of the published program: its blocks, its statistics, its relaxed weights, and its quirks."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aim.activations import Activations, load_activations
from aim.calibrate import CalibrationOptions, calibrate, read_blocks
from aim.calibration_text import CalibrationData, TokenBlocks
from aim.formula import factors, normalise, relax_like_the_reference
from checkpoints.errors import ArgumentError
from tests.aim_runs import attempt, embeddings, encoder, load, make_family, open_folder, perform, write_texts
from tests.golden_files import GOLDENS, assert_same_bits, golden, load_tensors
from tests.pico import Family
from tests.reference import aim as reference

INPUTS = GOLDENS / "inputs"
BASE = INPUTS / "base"
TEXTS = INPUTS / "calib.jsonl.gz"
SUMS = load_file(GOLDENS / "aim" / "aim_stats.safetensors")
FLOAT32 = load_file(GOLDENS / "aim" / "aim_stats_f32forward.safetensors")
TOKENS = load_file(GOLDENS / "aim" / "aim_blocks.safetensors")["blocks"].long()


@pytest.fixture(scope="module")
def blocks() -> TokenBlocks:
    return read_blocks(open_folder(BASE), CalibrationData(str(TEXTS)))


@pytest.fixture(scope="module")
def forward(blocks: TokenBlocks) -> Callable[..., Activations]:
    """Statistics of the golden base on the golden text."""

    def run(**options: Any) -> Activations:
        data = CalibrationData(str(TEXTS))
        return calibrate(
            open_folder(BASE), data, CalibrationOptions(**{"dtype": "auto", "tolerance": 0.0} | options), blocks=blocks
        )

    return run


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`aim_ta_o04` by performAIM.py from text to weights: its output, and the statistics that it saved."""
    folder = tmp_path_factory.mktemp("published")
    merged = GOLDENS / "merged" / golden("aim_ta_o04", "aim").config["merged"]
    flags = ["--numerics", "reference", "--calibration_data", TEXTS, "--omega", "0.4"]
    perform(BASE, merged, folder / "out", *flags, "--save_activations", folder / "sums.safetensors")
    return {"out": folder / "out", "activations": folder / "sums.safetensors"}


def relative_errors(activations: Activations, expected: Mapping[str, Tensor]) -> Tensor:
    """Of all channels of all tensors: our mean against the program's sum of block means."""
    assert set(activations.statistics) == {f"{module}.weight" for module in expected}
    ratios = [activations.statistics[f"{m}.weight"].mean_abs.double() * len(TOKENS) / a for m, a in expected.items()]
    return torch.cat([ratio - 1 for ratio in ratios]).abs()


# Text and statistics


def test_blocks_are_the_published_ones(blocks: TokenBlocks) -> None:
    assert_same_bits(blocks.tokens, TOKENS)
    assert blocks.texts == 256
    assert blocks.too_long > 0


def test_reference_picks_the_published_blocks() -> None:
    texts = [json.loads(line)["text"] for line in gzip.decompress(TEXTS.read_bytes()).splitlines()]
    encode = lambda text: encoder().encode(text).ids  # noqa: E731
    picked = reference.pick_blocks(texts, encode, n_samples=256, block_size=512, seed=42)
    assert_same_bits(picked, TOKENS)


@pytest.fixture(scope="module")
def by_hand() -> dict[str, Tensor]:
    """What the program would have summed up in float64: sums of block means, from the layers computed by hand."""
    total: dict[str, Tensor] = {}
    for blocks in TOKENS.split(10):
        for name, x in reference.llama_inputs(BASE, blocks).items():
            module = name.removesuffix(".weight")
            total[module] = total.get(module, 0) + x.abs().mean(dim=1).sum(dim=0)
    return total


def test_layers_by_hand_give_the_published_statistics(by_hand: dict[str, Tensor]) -> None:
    assert set(by_hand) == set(FLOAT32)
    for module, sums in by_hand.items():
        torch.testing.assert_close(FLOAT32[module].double(), sums, rtol=4e-7, atol=0)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_float32_forward_gives_the_published_statistics(
    batch_size: int, forward: Callable[..., Activations], by_hand: dict[str, Tensor]
) -> None:
    ours = forward(dtype="float32", batch_size=batch_size)
    assert relative_errors(ours, FLOAT32).max() < 4.5e-7  # the program's own are 3.9e-7 from float64
    assert relative_errors(ours, by_hand).max() < 3e-7


def test_bfloat16_forward_with_float32_sums_is_within_one_percent(forward: Callable[..., Activations]) -> None:
    errors = relative_errors(forward(batch_size=4), FLOAT32)
    assert errors.max() < 0.01
    assert errors.max() > 1e-5  # it did run in bfloat16


def test_reference_numerics_give_the_published_sums_bit_for_bit(published: dict[str, Path]) -> None:
    activations = load_activations(published["activations"])
    assert set(activations.statistics) == {f"{module}.weight" for module in SUMS}
    for module, sums in SUMS.items():
        assert_same_bits(activations.statistics[f"{module}.weight"].mean_abs, sums, where=module)
        assert activations.statistics[f"{module}.weight"].tokens == TOKENS.numel()


def test_reference_numerics_refuse_what_would_give_other_bits() -> None:
    with pytest.raises(ArgumentError, match=r"batch_size: numerics reference runs one block at a time, got 2"):
        CalibrationOptions(batch_size=2, numerics="reference")
    with pytest.raises(ArgumentError, match=r"dtype: numerics reference runs in bfloat16, got float32"):
        CalibrationOptions(dtype="float32", numerics="reference")


# Relaxed weights


@pytest.mark.parametrize("name", ["aim_ta_o04", "aim_ties_o04", "aim_ties_o04_sqrt"])
def test_relaxed_weights_are_the_published_ones(name: str, tmp_path: Path, published: dict[str, Path]) -> None:
    expected = golden(name, "aim")
    flags = ["--numerics", "reference", "--omega", "0.4", "--scaling", expected.config["scaling"]]
    if name == "aim_ta_o04":  # from text, in one go
        ours = load(published["out"])
    else:
        merged = GOLDENS / "merged" / expected.config["merged"]
        ours = perform(BASE, merged, tmp_path / "out", *flags, "--activations", published["activations"])
    assert set(ours) == set(expected.hashes)
    for tensor, values in ours.items():
        expected.check(tensor, values)


def test_merge_and_relaxation_in_one_is_the_published_one() -> None:
    expected = golden("aim_merge_lamb02_o02", "aim")
    inputs = expected.load_inputs()
    for name in expected.hashes:
        base = inputs["base"][name]
        delta = reference.published_merge(base, [inputs[model][name] for model in expected.models], 0.2)
        if name == "model.embed_tokens.weight":
            expected.check(name, base + delta)
            continue
        factor = factors(normalise(SUMS[name.removesuffix(".weight")]), 0.2)
        kept = relax_like_the_reference(torch.zeros(base.shape), delta.float(), factor)
        expected.check(name, (base.float() + kept).bfloat16())


def test_a_token_that_the_base_lacks_has_the_mean_of_its_rows_there(tmp_path: Path, published: dict[str, Path]) -> None:
    merged_folder = GOLDENS / "merged" / "pad_union_ta_f32"
    sums = load_file(GOLDENS / "aim" / "aim_stats_pad.safetensors")
    assert all(torch.equal(sums[name], SUMS[name]) for name in SUMS)  # no calibration text has that token
    flags = ["--numerics", "reference", "--omega", "0.4", "--activations", published["activations"]]
    ours = perform(BASE, merged_folder, tmp_path / "out", *flags)
    base, merged = load_tensors(BASE), load_tensors(merged_folder)
    assert set(ours) == set(merged)
    for name, values in merged.items():
        start = reference.with_mean_row(base[name]) if len(base[name]) < len(values) else base[name]
        share = None if name in embeddings(merged) else reference.published_share(sums[name[: -len(".weight")]], 0.4)
        expected = values if share is None else reference.published_relax(start, values, share)
        assert_same_bits(ours[name], expected, where=name)
    row, head = ours["lm_head.weight"][300], merged["lm_head.weight"][300]
    assert not torch.equal(row, head)
    # In float32 numerics a token without a base stays as merged.
    plain = perform(BASE, merged_folder, tmp_path / "plain", "--calibration_data", TEXTS, "--n_samples", "10")
    assert torch.equal(plain["lm_head.weight"][300], head)
    assert not torch.equal(plain["lm_head.weight"][299], merged["lm_head.weight"][299])


def test_reference_numerics_take_every_model_as_bfloat16() -> None:
    generator = torch.Generator().manual_seed(1)
    base, merged = (torch.randn(6, 8, generator=generator) for _ in range(2))
    share = torch.rand(8, generator=generator)
    relaxed = relax_like_the_reference(base, merged, share).bfloat16()
    assert_same_bits(relaxed, reference.published_relax(base, merged, share))


# Its quirks

Quirky = Callable[[str], tuple[Family, dict[str, Tensor], Activations, str]]


@pytest.fixture(scope="module")
def quirky(tmp_path_factory: pytest.TempPathFactory) -> Quirky:
    """Run performAIM.py --numerics reference on a pico family; the family, the output, the sums, and what it warned of."""

    def relax(architecture: str) -> tuple[Family, dict[str, Tensor], Activations, str]:
        folder = tmp_path_factory.mktemp(architecture)
        family = make_family(folder, architecture, n_models=1)
        flags = ["--numerics", "reference", "--omega", "0.3", "--save_activations", folder / "sums"]
        texts = write_texts(folder)
        ended = attempt(family.base, family.models[0], folder / "out", *flags, texts=texts, dtype=None)
        return family, load(folder / "out"), load_activations(folder / "sums"), ended.err

    return relax


def check_published(family: Family, ours: Mapping[str, Tensor], sums: Mapping[str, Tensor], relaxed: set[str]) -> None:
    """Exactly the tensors of `relaxed` are relaxed as the published program does, the others are the merge's bits."""
    base, merged = load(family.base), load(family.models[0])
    for name, values in merged.items():
        expected = values
        if name in relaxed:
            expected = reference.published_relax(base[name], values, reference.published_share(sums[name], 0.3))
            assert not torch.equal(expected, values), f"{name}: the test could not tell"
        assert_same_bits(ours[name], expected, where=name)


def test_a_tied_embedding_is_relaxed_as_the_head_with_a_warning(quirky: Quirky) -> None:
    family, ours, activations, warnings = quirky("qwen2")
    warning = "warning: --numerics reference: the embedding model.embed_tokens.weight is relaxed too, as lm_head.weight"
    assert warning in warnings
    sums = {name: one.mean_abs for name, one in activations.statistics.items()}
    assert set(sums) == {name for name in ours if not name.endswith("bias")}
    check_published(family, ours, sums, relaxed=set(sums))


def test_a_head_named_embed_on_disk_stays_as_merged_with_a_warning(quirky: Quirky) -> None:
    """transformers 5 calls the module `lm_head`; in the published program's it was `embed_out`, as on disk."""
    family, ours, activations, warnings = quirky("gpt_neox")
    assert "warning: --numerics reference: embed_out.weight is not relaxed, as its module's name contains 'embed'." in (
        warnings
    )
    sums = {name: one.mean_abs for name, one in activations.statistics.items()}
    assert set(sums) == {name for name in ours if name.endswith("weight") and "embed" not in name}
    check_published(family, ours, sums, relaxed=set(sums))
    plain = perform(family.base, family.models[0], family.base.parent / "plain", texts=write_texts(family.base.parent))
    assert not torch.equal(plain["embed_out.weight"], ours["embed_out.weight"])  # in float32 numerics it is a head


def test_a_norm_named_embed_stays_as_merged(quirky: Quirky) -> None:
    family, ours, activations, warnings = quirky("bloom")
    assert "transformer.word_embeddings_layernorm.weight is not relaxed" in warnings
    assert "the embedding transformer.word_embeddings.weight is relaxed too" in warnings
    sums = {name: one.mean_abs for name, one in activations.statistics.items()}
    norm = "transformer.word_embeddings_layernorm.weight"
    assert set(sums) == {name for name in ours if name.endswith("weight")} - {norm}
    check_published(family, ours, sums, relaxed=set(sums))


def test_a_stored_tied_head_is_relaxed_as_its_embedding(tmp_path: Path) -> None:
    family = make_family(tmp_path, "qwen2", n_models=1)
    flags: dict[str, Any] = {"texts": write_texts(tmp_path), "dtype": None}
    expected = perform(family.base, family.models[0], tmp_path / "one", "--numerics", "reference", **flags)
    for folder in (family.base, family.models[0]):
        tensors = load(folder)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ours = perform(family.base, family.models[0], tmp_path / "two", "--numerics", "reference", **flags)
    head = ours.pop("lm_head.weight", ours["model.embed_tokens.weight"])  # or it is left out, as it is tied
    assert_same_bits(head, expected["model.embed_tokens.weight"])
    assert set(ours) == set(expected)
    for name, values in expected.items():
        assert_same_bits(ours[name], values, where=name)


@pytest.mark.parametrize(
    ("architecture", "problem"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn.weight: the published program cannot relax it (conv1d)"),
        ("mixtral", "experts.0.w1.weight: the published program had a module for each expert"),
    ],
)
def test_models_that_the_published_program_cannot_relax_are_refused(
    architecture: str, problem: str, tmp_path: Path
) -> None:
    family = make_family(tmp_path, architecture, n_models=1)
    flags = ["--numerics", "reference"]
    texts = write_texts(tmp_path)
    ended = attempt(family.base, family.models[0], tmp_path / "out", *flags, texts=texts, dtype=None, code=1)
    assert problem in ended.err
    assert not (tmp_path / "out").exists()


def test_statistics_of_the_other_numerics_are_refused(tmp_path: Path, published: dict[str, Path]) -> None:
    merged = GOLDENS / "merged" / "ta_aimdefault"
    ended = attempt(BASE, merged, tmp_path / "out", "--activations", published["activations"], code=1)
    assert "--numerics reference" in ended.err
    assert not (tmp_path / "out").exists()
