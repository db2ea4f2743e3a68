"""Relaxed weights against plain float64, for every architecture and through the command; and the laws they obey."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import merge
import performAIM
from aim.activations import Activations, load_activations
from aim.calibrate import CalibrationOptions
from aim.formula import factors, normalise, relax, without_channels
from aim.omegas import Omega
from aim.relax_work import relax_checkpoint
from aim.relaxation import ChannelFactors, Relaxation
from aim.transforms import Relaxing, make_relaxations
from checkpoints.errors import ArgumentError, InputError
from streaming.blocks import TensorSpec, tile
from streaming.output import RunOptions
from streaming.stream import StreamOptions
from tests.aim_runs import (
    ARCHITECTURES,
    attempt,
    calibrate_on,
    embeddings,
    load,
    make_family,
    open_folder,
    perform,
    shares_of,
    text_blocks,
    weight_bytes,
    write_texts,
)
from tests.golden_files import assert_same_bits
from tests.in_memory import assert_rounds_to
from tests.pico import Family
from tests.reference import aim as reference
from tests.scene import call, names

OMEGA = 0.3
Shares = Mapping[str, tuple[Tensor, int]]


@dataclass(frozen=True)
class Relaxed:
    """A family that is relaxed, its calibration text, statistics that performAIM.py saved of it, and the reference's."""

    family: Family
    texts: Path
    saved: Path
    shares: Callable[..., Shares]

    @property
    def base(self) -> Path:
        return self.family.base

    @property
    def merged(self) -> Path:
        return self.family.models[0]

    def activations(self) -> Activations:
        return load_activations(self.saved)

    def perform(self, out: Path, *flags: object) -> dict[str, Tensor]:
        """performAIM.py with the saved statistics."""
        return perform(self.base, self.merged, out, "--activations", self.saved, *flags)


@pytest.fixture(scope="module")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Relaxed]:
    """Architecture -> a family of it; the first command, from text to weights, has written `out` beside the family."""

    def make(architecture: str) -> Relaxed:
        folder = tmp_path_factory.mktemp(architecture)
        family = make_family(folder, architecture, n_models=2)
        texts, saved = write_texts(folder), folder / "saved"
        flags = ["--omega", OMEGA, "--dtype", "float32", "--save_activations", saved]
        perform(family.base, family.models[0], folder / "out", *flags, texts=texts)
        shares = cache(lambda scaling="identity": shares_of(family.base, text_blocks(), 0.0, scaling))
        return Relaxed(family, texts, saved, lambda scaling="identity": shares(scaling))

    return cache(make)


def at(shares: Shares, omega: float | Mapping[str, float]) -> Shares:
    """Shares of omega 0 (that is 1 - s) -> those of another omega."""
    each = {name: omega if isinstance(omega, float) else omega[name] for name in shares}
    return {name: (1 - (1 - share) * (1 - each[name]), dim) for name, (share, dim) in shares.items()}


def check_relaxed(ours: Mapping[str, Tensor], base: Path, merged: Path, shares: Shares) -> None:
    """Raise AssertionError unless float32 `ours` are the reference's and all without a share are the merge's bits."""
    starts, ends = load(base), load(merged)
    assert set(ours) == set(ends)
    for name, end in ends.items():
        got = ours[name]
        assert got.dtype == torch.float32
        if name not in shares:
            assert_same_bits(got, end.float(), where=name)
            continue
        share, dim = shares[name]
        expected = reference.relax(starts[name], end, share, dim)
        delta = (end.double() - starts[name].double()).abs()
        size = torch.maximum(end.double().abs(), starts[name].double().abs())
        slack = 2e-5 * delta + 2.0**-22 * size  # of the statistics, and of float32
        assert bool(((got.double() - expected).abs() <= slack).all()), f"{name}: {(got - expected).abs().max()}"


# Every architecture


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_relaxed_weights_are_the_formulas(architecture: str, family_of: Callable[[str], Relaxed]) -> None:
    relaxed = family_of(architecture)
    ours, shares = load(relaxed.base.parent / "out"), at(relaxed.shares(), OMEGA)
    check_relaxed(ours, relaxed.base, relaxed.merged, shares)
    merged = load(relaxed.merged)
    kept = {name for name in merged if name not in shares}
    assert kept >= set(embeddings(merged)) | {name for name in merged if "bias" in name}
    assert all(not torch.equal(ours[name], merged[name].float()) for name in shares)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_comparison_notices_a_wrong_axis_and_a_flipped_sign(
    architecture: str, family_of: Callable[[str], Relaxed]
) -> None:
    relaxed = family_of(architecture)
    ours, shares = load(relaxed.base.parent / "out"), dict(at(relaxed.shares(), OMEGA))
    name = {
        "llama": "model.layers.0.self_attn.o_proj.weight",
        "gpt2": "transformer.h.0.attn.c_proj.weight",
    }[architecture]
    share, dim = shares[name]
    flipped = {name: torch.flip(share, [0]) for name, (share, _) in shares.items()}
    for wrong in (
        (share, 1 - dim),
        (2 - share, dim),  # away from the base
        (-share, dim),  # the delta's sign
        (1 - share, dim),  # towards the base where the base does not care
        (flipped[name], dim),
    ):
        with pytest.raises(AssertionError):
            check_relaxed(ours, relaxed.base, relaxed.merged, {**shares, name: wrong})
    del shares[name]
    with pytest.raises(AssertionError):
        check_relaxed(ours, relaxed.base, relaxed.merged, shares)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_oss"])
def test_outputs_are_rounded_once(architecture: str, family_of: Callable[[str], Relaxed], tmp_path: Path) -> None:
    relaxed = family_of(architecture)
    ours = relaxed.perform(tmp_path / "out", "--omega", OMEGA)
    starts, ends = load(relaxed.base), load(relaxed.merged)
    for name, (share, dim) in at(relaxed.shares(), OMEGA).items():
        assert ours[name].dtype == torch.bfloat16
        expected = reference.relax(starts[name], ends[name], share, dim)
        slack = 2e-5 * (ends[name].double() - starts[name].double()).abs() + 2.0**-22 * expected.abs()
        assert_rounds_to(ours[name], expected, slack, where=name)


@pytest.mark.parametrize("scaling", ["sqrt", "square"])
def test_importance_is_scaled(scaling: str, family_of: Callable[[str], Relaxed], tmp_path: Path) -> None:
    relaxed = family_of("llama")
    ours = relaxed.perform(tmp_path / "out", "--omega", OMEGA, "--scaling", scaling, "--dtype", "float32")
    check_relaxed(ours, relaxed.base, relaxed.merged, at(relaxed.shares(scaling), OMEGA))
    with pytest.raises(AssertionError):
        check_relaxed(ours, relaxed.base, relaxed.merged, at(relaxed.shares(), OMEGA))


def test_omega_by_filter_takes_the_first_that_matches(family_of: Callable[[str], Relaxed], tmp_path: Path) -> None:
    relaxed = family_of("llama")
    flag = "self_attn.q=1,mlp.up=0.1,mlp=0.9,layers.1=0.6,0.25"
    ours = relaxed.perform(tmp_path / "out", "--omega", flag, "--dtype", "float32")
    omegas = {}
    for name in relaxed.shares():
        if "self_attn.q" in name:
            omegas[name] = 1.0
        elif "mlp.up" in name:
            omegas[name] = 0.1
        elif "mlp" in name:
            omegas[name] = 0.9
        elif "layers.1" in name:
            omegas[name] = 0.6
        else:
            omegas[name] = 0.25
    assert set(omegas.values()) == {1.0, 0.1, 0.9, 0.6, 0.25}
    check_relaxed(ours, relaxed.base, relaxed.merged, at(relaxed.shares(), omegas))
    queries = "model.layers.1.self_attn.q_proj.weight"
    assert_same_bits(ours[queries], load(relaxed.merged)[queries].float())


# Laws


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_ends_are_exact(architecture: str, family_of: Callable[[str], Relaxed], tmp_path: Path) -> None:
    relaxed = family_of(architecture)
    base, merged = load(relaxed.base), load(relaxed.merged)
    unchanged = relaxed.perform(tmp_path / "one", "--omega", "1")
    for name, values in merged.items():
        assert_same_bits(unchanged[name], values, where=name)
    itself = perform(relaxed.base, relaxed.base, tmp_path / "itself", "--activations", relaxed.saved, "--omega", "0.2")
    for name, values in base.items():
        assert_same_bits(itself[name], values, where=name)
    restored = relaxed.perform(tmp_path / "zero", "--omega", "0")
    for name, (share, dim) in relaxed.shares().items():
        most = share.argmin(dim=-1)  # of each expert
        for expert, channel in enumerate(most) if share.dim() == 2 else [(None, most)]:
            got, start, end = (x[name] if expert is None else x[name][expert] for x in (restored, base, merged))
            along = dim if expert is None else dim - 1
            where = f"{name}, expert {expert}, channel {channel}"
            got, start, end = (x.select(along, int(channel)) for x in (got, start, end))
            assert_same_bits(got, start, where=where)
            if start.dim():
                assert not torch.equal(start, end), where


def test_statistics_in_a_file_give_the_same_bytes(family_of: Callable[[str], Relaxed], tmp_path: Path) -> None:
    for architecture in ("llama", "mixtral"):
        relaxed = family_of(architecture)
        relaxed.perform(tmp_path / architecture, "--omega", OMEGA, "--dtype", "float32")
        assert weight_bytes(tmp_path / architecture) == weight_bytes(relaxed.base.parent / "out")


def test_a_sweep_is_its_single_runs(family_of: Callable[[str], Relaxed], tmp_path: Path) -> None:
    relaxed = family_of("gpt2")
    perform(relaxed.base, relaxed.merged, tmp_path / "sweep", "--omegas", "0,0.25,1", texts=relaxed.texts)
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["omega_0", "omega_0.25", "omega_1"]
    for omega in ("0", "0.25", "1"):
        relaxed.perform(tmp_path / omega, "--omega", omega)
        assert weight_bytes(tmp_path / "sweep" / f"omega_{omega}") == weight_bytes(tmp_path / omega)
    different = {
        weight_bytes(tmp_path / "sweep" / f"omega_{omega}")["model.safetensors"] for omega in ("0", "0.25", "1")
    }
    assert len(different) == 3


@pytest.mark.parametrize(
    "architecture", ["llama", "mixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "gpt_oss"))]
)
def test_bytes_do_not_depend_on_workers_or_blocks(
    architecture: str, family_of: Callable[[str], Relaxed], tmp_path: Path
) -> None:
    relaxed = family_of(architecture)
    found = set()
    for number, (workers, elements) in enumerate([(1, None), (3, 1000), (2, 90), (1, 23)]):
        options = RunOptions(stream=StreamOptions(workers=workers, block_elements=elements), quiet=True)
        merged, base = open_folder(relaxed.merged), open_folder(relaxed.base)
        how = Relaxing((Omega(OMEGA),))
        relax_checkpoint(merged, base, relaxed.activations(), tmp_path / str(number), how, options)
        found.add(weight_bytes(tmp_path / str(number))["model.safetensors"])
    assert len(found) == 1


# With merge.py


def merge_models(of: Relaxed, out: Path, *flags: object, method: str = "ties") -> dict[str, Tensor]:
    """merge.py on both models of a family."""
    models = ["--method", method, "--base_model", of.base, "--models_to_merge", names(of.family.models)]
    call(merge, *models, "--save_path", out, "--quiet", "--report", "none", *flags)
    return load(out)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_merging_with_omega_is_merging_and_then_relaxing(
    architecture: str, family_of: Callable[[str], Relaxed], tmp_path: Path
) -> None:
    relaxed = family_of(architecture)
    saved = ["--activations", relaxed.saved, "--omega", OMEGA]
    plain = merge_models(relaxed, tmp_path / "plain", "--dtype", "float32")
    both = merge_models(relaxed, tmp_path / "both", "--dtype", "float32", *saved)
    after = perform(relaxed.base, tmp_path / "plain", tmp_path / "after", *saved)
    assert set(both) == set(after) == set(plain)
    for name, values in after.items():
        assert_same_bits(both[name], values, where=name)
    check_relaxed(both, relaxed.base, tmp_path / "plain", at(relaxed.shares(), OMEGA))
    # In bfloat16 the two commands round the merge, too.
    rounded = merge_models(relaxed, tmp_path / "plain16")
    both16 = merge_models(relaxed, tmp_path / "both16", *saved)
    after16 = perform(relaxed.base, tmp_path / "plain16", tmp_path / "after16", *saved)
    for name, exact in both.items():
        assert_same_bits(both16[name], exact.bfloat16(), where=name)
        half_a_step = (rounded[name].double() - plain[name].double()).abs()
        assert_rounds_to(after16[name], exact.double(), half_a_step + 2.0**-22 * exact.double().abs(), where=name)
    assert any(not torch.equal(both16[name], after16[name]) for name in both)


def test_merging_with_an_omega_of_one_is_merging(family_of: Callable[[str], Relaxed], tmp_path: Path) -> None:
    relaxed = family_of("llama")
    for method in ("task_arithmetic", "linear"):
        merge_models(relaxed, tmp_path / f"{method}_plain", method=method)
        flags = ["--activations", relaxed.saved, "--omega", "1"]
        merge_models(relaxed, tmp_path / f"{method}_one", *flags, method=method)
        assert weight_bytes(tmp_path / f"{method}_plain") == weight_bytes(tmp_path / f"{method}_one")


def test_a_method_in_weight_space_is_relaxed_towards_the_base(
    family_of: Callable[[str], Relaxed], tmp_path: Path
) -> None:
    relaxed = family_of("llama")
    plain = merge_models(relaxed, tmp_path / "plain", "--dtype", "float32", method="linear")
    flags = ["--dtype", "float32", "--activations", relaxed.saved, "--omega", OMEGA]
    both = merge_models(relaxed, tmp_path / "both", *flags, method="linear")
    check_relaxed(both, relaxed.base, tmp_path / "plain", at(relaxed.shares(), OMEGA))
    assert set(both) == set(plain)


# Controls


def recovered_shares(ours: Tensor, start: Tensor, end: Tensor, dim: int) -> Tensor:
    """What each channel of a float32 output kept of its task vector, from its largest delta."""
    delta = (end.double() - start.double()).movedim(dim, -1).reshape(-1, start.shape[dim])
    kept = (ours.double() - start.double()).movedim(dim, -1).reshape(-1, start.shape[dim])
    row = delta.abs().argmax(dim=0, keepdim=True)
    return (kept.gather(0, row) / delta.gather(0, row))[0]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_oss"])
def test_uniform_control_gives_every_channel_the_mean(
    architecture: str, family_of: Callable[[str], Relaxed], tmp_path: Path
) -> None:
    relaxed = family_of(architecture)
    flags = ["--omega", OMEGA, "--dtype", "float32"]
    ours = relaxed.perform(tmp_path / "out", *flags, "--control", "uniform")
    shares = at(relaxed.shares(), OMEGA)
    means = {name: (share.mean(-1, keepdim=True).expand_as(share), dim) for name, (share, dim) in shares.items()}
    check_relaxed(ours, relaxed.base, relaxed.merged, means)
    with pytest.raises(AssertionError):
        check_relaxed(ours, relaxed.base, relaxed.merged, shares)


def test_permuted_control_gives_the_same_shares_to_other_channels(
    family_of: Callable[[str], Relaxed], tmp_path: Path
) -> None:
    relaxed = family_of("gpt2")
    flags = ["--omega", OMEGA, "--dtype", "float32", "--control", "permuted"]
    runs = {name: relaxed.perform(tmp_path / name, *flags, *seed) for name, *seed in
            (("default",), ("zero", "--seed", "0"), ("again", "--seed", "0"), ("one", "--seed", "1"))}  # fmt: skip
    assert weight_bytes(tmp_path / "default") == weight_bytes(tmp_path / "zero") == weight_bytes(tmp_path / "again")
    base, merged = load(relaxed.base), load(relaxed.merged)
    orders = set()
    for name, (share, dim) in at(relaxed.shares(), OMEGA).items():
        if base[name].dim() < 2:
            continue
        zero, one = (recovered_shares(runs[run][name], base[name], merged[name], dim) for run in ("zero", "one"))
        for kept in (zero, one):
            torch.testing.assert_close(kept.sort().values, share.sort().values, rtol=0, atol=1e-4)
            assert (kept - share).abs().max() > 0.01, name
        assert (zero - one).abs().max() > 0.01, name
        order = (zero[:, None] - share[None]).abs().argmin(dim=1)
        orders.add(tuple(order.tolist()))
    assert len(orders) == 8  # each tensor has its own
    models = ["--method", "linear", "--base_model", relaxed.base, "--models_to_merge", relaxed.merged]
    command = [*models, "--save_path", tmp_path / "merge", "--quiet", "--activations", relaxed.saved, *flags]
    for seed in ("0", "1"):
        call(merge, *command, "--seed", seed, "--overwrite")
        assert weight_bytes(tmp_path / "merge") == weight_bytes(tmp_path / {"0": "zero", "1": "one"}[seed])


@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40),
    st.integers(0, 2**31),
    st.sampled_from([None, 1, 3]),
)
def test_controls_keep_how_much_is_relaxed(values: list[float], seed: int, experts: int | None) -> None:
    f = torch.tensor(values) if experts is None else torch.tensor([values] * experts)
    assert without_channels(f, "none", seed=seed, tensor="w") is f
    uniform = without_channels(f, "uniform", seed=seed, tensor="w")
    assert uniform.shape == f.shape
    torch.testing.assert_close(uniform, f.double().mean(-1, keepdim=True).expand_as(f).float(), rtol=1e-6, atol=1e-7)
    permuted = without_channels(f, "permuted", seed=seed, tensor="w")
    assert torch.equal(permuted.sort(dim=-1).values, f.sort(dim=-1).values)
    assert torch.equal(permuted, without_channels(f.clone(), "permuted", seed=seed, tensor="w"))


def test_permutations_differ_between_seeds_and_tensors() -> None:
    f = torch.arange(64) / 64
    draws = [without_channels(f, "permuted", seed=s, tensor=t) for s in (0, 1) for t in ("a", "b")]
    assert len({tuple(draw.tolist()) for draw in draws} | {tuple(f.tolist())}) == 5


# What stays as merged


def test_experts_without_a_token_stay_as_merged_and_are_listed(
    family_of: Callable[[str], Relaxed], tmp_path: Path
) -> None:
    one = torch.tensor([[17]])
    for architecture in ("mixtral", "gpt_oss"):
        relaxed = family_of(architecture)
        activations = calibrate_on(relaxed.base, one)
        activations.save(tmp_path / architecture)
        out = tmp_path / f"{architecture}_out"
        command = ["--merged_model", relaxed.merged, "--pretrained_model_name", relaxed.base, "--save_path", out]
        flags = ["--activations", tmp_path / architecture, "--omega", "0", "--dtype", "float32"]
        said = call(performAIM, *command, *flags).out
        shares = shares_of(relaxed.base, one, 0.0)
        check_relaxed(load(out), relaxed.base, relaxed.merged, shares)
        kept = json.loads((out / "merge_recipe.json").read_text())["aim"]["kept"]
        listed = {(entry["tensors"], entry["why"]): entry["count"] for entry in kept}
        if architecture == "mixtral":
            assert len(activations.silent) == 12
            kind = "model.layers.*.block_sparse_moe.experts.*.w2.weight"
            assert listed[kind, "its module saw no token"] == 4  # two experts of two layers
            assert "its module saw no token" in said
        else:
            ours, merged = (load(path)["model.layers.0.mlp.experts.down_proj"] for path in (out, relaxed.merged))
            idle = activations.statistics["model.layers.0.mlp.experts.down_proj"].tokens == 0
            assert int(idle.sum()) == 2
            assert torch.equal(ours[idle], merged[idle].float())
            assert all(not torch.equal(ours[e], merged[e].float()) for e in (~idle).nonzero().flatten().tolist())
            reason = "2 of its 4 experts, which saw no token"
            assert listed["model.layers.*.mlp.experts.down_proj", reason] == 2
            assert reason in said


def test_a_tensor_without_statistics_stays_as_merged(family_of: Callable[[str], Relaxed], tmp_path: Path) -> None:
    relaxed = family_of("llama")
    activations = relaxed.activations()
    lost = "model.layers.1.mlp.up_proj.weight"
    fewer = {name: one for name, one in activations.statistics.items() if name != lost}
    part = replace(activations, statistics=fewer, silent={lost: "its module saw no token"})
    how = Relaxing((Omega(OMEGA),))
    relax_checkpoint(
        open_folder(relaxed.merged), open_folder(relaxed.base), part, tmp_path / "out", how, out_dtype="float32"
    )
    shares = {name: share for name, share in at(relaxed.shares(), OMEGA).items() if name != lost}
    check_relaxed(load(tmp_path / "out"), relaxed.base, relaxed.merged, shares)


def test_statistics_of_another_base_or_shape_are_refused(family_of: Callable[[str], Relaxed], tmp_path: Path) -> None:
    relaxed = family_of("llama")
    out = tmp_path / "out"
    exchanged = attempt(relaxed.merged, relaxed.base, out, "--activations", relaxed.saved, code=1)
    assert "another base" in exchanged.err
    activations = relaxed.activations()
    name = "model.layers.1.mlp.up_proj.weight"
    statistics = activations.statistics[name]
    short = replace(statistics, mean_abs=statistics.mean_abs[:-1])
    wrong = replace(activations, statistics={**activations.statistics, name: short})
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj.*expected .*32.*got \[?31"):
        make_relaxations(open_folder(relaxed.base), wrong, Relaxing(), device=torch.device("cpu"))
    assert not out.exists()


# The formula itself


def test_relax_by_hand() -> None:
    """s = [1, 0.5, 0]; omega 0.4: factors 1 - s * 0.6 = [0.4, 0.7, 1]."""
    base = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    merged = torch.tensor([[2.0, 4.0, 5.0], [10.0, 10.0, 10.0]])
    expected = torch.tensor([[1.4, 3.4, 5.0], [4.0, 7.0, 10.0]])
    torch.testing.assert_close(relax(base, merged, torch.tensor([8.0, 4.0, 0.0]), 0.4), expected)
    torch.testing.assert_close(relax(base[0], merged[0], torch.tensor([8.0, 4.0, 0.0]), 0.4), expected[0])


channels = st.lists(st.floats(0, 1e4, width=32, allow_subnormal=False), min_size=1, max_size=12).filter(any)


@given(channels, st.floats(0, 1), st.integers(0, 2**16))
def test_relax_is_the_formula_and_its_ends_are_exact(importance: list[float], omega: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    base, merged = (torch.randn(5, len(importance), generator=generator) for _ in range(2))
    a = torch.tensor(importance)
    share = reference.keep(reference.importance(a), omega)
    expected = reference.relax(base, merged, share, 1)
    slack = 1e-6 * (base.abs() + merged.abs())
    assert bool(((relax(base, merged, a, omega) - expected).abs() <= slack).all())
    assert torch.equal(relax(base, merged, a, 1.0), merged)
    assert torch.equal(relax(base, base, a, omega), base)
    assert torch.equal(relax(base, merged, a, 0.0)[:, a == a.max()], base[:, a == a.max()])


SHAPES = [((6,), 0), ((5, 6), 1), ((6, 5), 0), ((3, 5, 6), 2), ((3, 6, 5), 1), ((1, 1), 0), ((1, 1), 1)]


@given(st.sampled_from(SHAPES), st.integers(1, 40), st.integers(0, 2**16))
def test_blocks_are_relaxed_as_whole_tensors_are(shape: tuple[tuple[int, ...], int], elements: int, seed: int) -> None:
    sizes, dim = shape
    generator = torch.Generator().manual_seed(seed)
    base, merged = (torch.randn(sizes, generator=generator) for _ in range(2))
    share = torch.rand((*sizes[:-2], sizes[dim]) if len(sizes) > 2 else (sizes[dim],), generator=generator)
    share = torch.where(share < 0.3, 0.0, torch.where(share > 0.7, 1.0, share))
    tensor = TensorSpec("w", sizes)
    transform = Relaxation({"w": ChannelFactors(share, dim)}, torch.device("cpu"))
    out = torch.full((tensor.numel,), torch.nan)
    for region in tile(tensor, elements):
        start, end = (x.flatten()[region.start : region.stop].clone() for x in (base, merged))
        out[region.start : region.stop] = transform(region, start, end)
        assert torch.equal(start, base.flatten()[region.start : region.stop])  # neither is overwritten
        assert torch.equal(end, merged.flatten()[region.start : region.stop])
    expected = reference.relax(base, merged, share.double(), dim)
    torch.testing.assert_close(out.view(sizes).double(), expected, rtol=1e-5, atol=1e-6)
    spread = reference.along(share, sizes, dim).expand(sizes)
    assert torch.equal(out.view(sizes)[spread == 0], base[spread == 0])  # both ends exactly
    assert torch.equal(out.view(sizes)[spread == 1], merged[spread == 1])


@pytest.mark.parametrize("importance", [[-1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0], [0.0, 0.0]])
def test_importance_that_cannot_be_is_refused(importance: list[float]) -> None:
    with pytest.raises(ValueError, match="importance"):
        normalise(torch.tensor(importance))


def test_shapes_that_do_not_fit_are_refused() -> None:
    for base, merged, importance in ((2, 3), (3, 2), (3,)), ((2, 3), (2, 3), (2,)), ((3, 3), (3, 3), (3, 3)):
        with pytest.raises(ValueError, match="one shape"):
            relax(torch.ones(base), torch.ones(merged), torch.ones(importance), 0.4)


@pytest.mark.parametrize("omega", [-0.1, 1.1, float("nan"), float("inf")])
def test_an_omega_outside_its_range_is_refused(omega: float) -> None:
    with pytest.raises(ArgumentError, match=r"omega: expected a number in \[0, 1\]"):
        factors(torch.ones(3), omega)


def test_calibration_options_are_checked() -> None:
    with pytest.raises(ArgumentError, match="batch_size: expected at least 1, got 0"):
        CalibrationOptions(batch_size=0)
    with pytest.raises(ArgumentError, match="dtype: expected auto, float32"):
        CalibrationOptions(dtype="int8")
