"""`--protect mean`: the task vector's answer to the base's mean input taken back, against plain float64, and the laws it obeys."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import merge
import performAIM
from aim import directions
from aim.activations import Activations, load_activations
from aim.directions import MeanDirection
from aim.formula import direction, other_direction, protect_mean
from aim.omegas import Omega
from aim.reading import read_request
from aim.relax_work import relax_checkpoint
from aim.relaxation import Relaxation
from aim.request import AimRequest
from aim.transforms import Relaxing
from checkpoints.errors import ArgumentError, Refusals
from merging import make_recipe
from merging.merge_work import merge as run_merge
from streaming import stream
from streaming.blocks import Block, Region, TensorSpec, tile
from streaming.fused import Loading
from streaming.machine_code import can_compile
from streaming.output import RunOptions
from streaming.stream import StreamOptions
from tests.aim_runs import (
    attempt,
    calibrate_on,
    embeddings,
    load,
    make_family,
    open_folder,
    perform,
    text_blocks,
    weight_bytes,
    write_texts,
)
from tests.golden_files import assert_same_bits
from tests.pico import Family
from tests.reference import aim as reference
from tests.scene import call

ARCHITECTURES = ["llama", "gpt2", "mixtral", "gpt_oss"]
"""`[out, in]`, `[in, out]`, experts one by one, experts packed and stored input first."""
OMEGA = 0.25
MEAN = ["--protect", "mean", "--dtype", "float32"]


@dataclass(frozen=True)
class Relaxed:
    """A family that is relaxed, statistics of its base, and what the reference saw of every weight's input: signed mean, mean |x|, dimension."""

    family: Family
    saved: Path
    inputs: Callable[[], dict[str, tuple[Tensor, Tensor, int]]]

    @property
    def base(self) -> Path:
        return self.family.base

    @property
    def merged(self) -> Path:
        return self.family.models[0]

    def perform(self, out: Path, *flags: object) -> dict[str, Tensor]:
        return perform(self.base, self.merged, out, "--activations", self.saved, *MEAN, *flags)


@pytest.fixture(scope="module")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Relaxed]:
    def make(architecture: str) -> Relaxed:
        folder = tmp_path_factory.mktemp(architecture)
        family = make_family(folder, architecture, n_models=2)
        calibrate_on(family.base, text_blocks()).save(folder / "saved")

        def inputs() -> dict[str, tuple[Tensor, Tensor, int]]:
            stored = load(family.base)
            seen = reference.watch_inputs(family.base, text_blocks())
            return {
                name: (one.mean(stored[name].shape), one.statistics(stored[name].shape)[0], one.input_dim)
                for name, one in seen.items()
                if name not in embeddings(stored)
            }

        return Relaxed(family, folder / "saved", cache(inputs))

    return cache(make)


Formula = Callable[[Tensor, Tensor, Tensor, float, int], Tensor]


def check(ours: dict[str, Tensor], relaxed: Relaxed, merged: Path, formula: Formula = reference.protect_mean) -> None:
    """Raise AssertionError unless matrices are the formula's, norms relaxed by channel, and the rest the merge's bits."""
    starts, ends, inputs = load(relaxed.base), load(merged), relaxed.inputs()
    assert set(ours) == set(ends)
    for name, end in ends.items():
        got, start = ours[name], starts[name]
        if name not in inputs:
            assert_same_bits(got, end.float(), where=name)
            continue
        mean, mean_abs, dim = inputs[name]
        if end.dim() == 1:
            expected = reference.relax(start, end, reference.keep(reference.importance(mean_abs), OMEGA), dim)
        else:
            expected = formula(start, end, mean, OMEGA, dim)
        size = torch.maximum(end.double().abs(), start.double().abs())
        slack = (
            1e-4 * (end.double() - start.double()).abs().max() + 2.0**-22 * size
        )  # of the statistics, and of float32
        assert bool(((got.double() - expected).abs() <= slack).all()), f"{name}: {(got - expected).abs().max()}"


# ------------------------------------------------------------------------------------------------------- the formula


def test_by_hand() -> None:
    # mean (3, 4), u = (.6, .8); D = [[1, 2], [3, 0]], D u = (2.2, 1.8)
    # (D u) u^T = [[1.32, 1.76], [1.08, 1.44]]; omega 0 leaves [[-.32, .24], [1.92, -1.44]], omega .5 half of the way
    base = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    merged = base + torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    mean = torch.tensor([3.0, 4.0])
    torch.testing.assert_close(
        protect_mean(base, merged, mean, 0.0), base + torch.tensor([[-0.32, 0.24], [1.92, -1.44]])
    )
    torch.testing.assert_close(
        protect_mean(base, merged, mean, 0.5), base + torch.tensor([[0.34, 1.12], [2.46, -0.72]])
    )
    assert torch.equal(protect_mean(base, merged, mean, 1.0), merged)
    assert torch.equal(protect_mean(base, merged, torch.zeros(2), 0.0), merged)


def test_the_uniform_control_by_hand() -> None:
    # |D|^2 = 14, |D u|^2 = 2.2^2 + 1.8^2 = 8.08; omega 0: |D'|^2 = 5.92; omega .5: 14 - .75 * 8.08 = 7.94
    base, delta = torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    for omega, squared in ((0.0, 5.92), (0.5, 7.94)):
        pull = MeanDirection(direction(torch.tensor([3.0, 4.0])), 1, omega, is_uniform=True)
        torch.testing.assert_close(streamed(pull, base, delta, 4), delta * (squared / 14) ** 0.5)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_direction_has_length_1(scale: float) -> None:
    u = direction(torch.tensor([[3.0, -4.0], [0.0, 0.0]]) * scale)
    torch.testing.assert_close(u, torch.tensor([[0.6, -0.8], [0.0, 0.0]], dtype=torch.float64), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="mean: expected finite"):
        direction(torch.tensor([float("nan")]))


def test_controls_draw_by_seed_and_tensor() -> None:
    u = direction(torch.randn(3, 64, generator=torch.Generator().manual_seed(0)))
    u[1] = 0.0  # an expert that saw no token
    drawn = []
    for control in ("permuted", "random"):
        for seed, tensor in ((0, "a"), (0, "b"), (1, "a")):
            one = other_direction(u, control, seed=seed, tensor=tensor)  # type: ignore[arg-type]
            assert torch.equal(one, other_direction(u, control, seed=seed, tensor=tensor))  # type: ignore[arg-type]
            assert not one[1].any()
            torch.testing.assert_close(one[::2].norm(dim=-1), torch.ones(2, dtype=torch.float64))
            drawn.append(tuple(one.flatten().tolist()))
            if control == "permuted":
                assert torch.equal(one.sort(dim=-1).values, u.sort(dim=-1).values)
            else:
                assert not torch.equal(one[0], one[2])  # each expert its own
    assert len(set(drawn)) == 6
    for control in ("none", "uniform"):
        assert other_direction(u, control, seed=0, tensor="a") is u  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        protect_mean(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2), 0.5)
    with pytest.raises(ArgumentError, match=r"omega: expected a number in \[0, 1\]"):
        protect_mean(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3), 1.5)


# ---------------------------------------------------------------------------------------------------------- in blocks


def streamed(pull: MeanDirection, base: Tensor, merged: Tensor, elements: int) -> Tensor:
    """What the engine makes of a merge in blocks of so many elements (more, where rows are whole)."""
    tensor = TensorSpec("w", tuple(base.shape))
    transform = Relaxation({"w": pull}, torch.device("cpu"))

    def parts(region: Region) -> tuple[Tensor, Tensor]:
        return tuple(x.flatten()[region.start : region.stop].clone() for x in (base, merged))  # type: ignore[return-value]

    def scan(look: Callable[[Block], Any], regions: Sequence[Region] | None = None) -> Iterator[Any]:
        for region in regions or tile(tensor, directions.GRID_ELEMENTS):
            start, end = parts(region)
            yield look(Block(region, start, [], [end]))

    assert transform.whole_rows("w")
    statistics = transform.measure(tensor, scan)
    out = torch.full((tensor.numel,), torch.nan)
    for region in tile(tensor, max(elements, directions.GRID_ELEMENTS)):
        start, end = parts(region)
        out[region.start : region.stop] = transform(region, start, end, statistics)
        assert torch.equal(start, base.flatten()[region.start : region.stop])  # neither is overwritten
        assert torch.equal(end, merged.flatten()[region.start : region.stop])
    transform.tally.close("w")
    change = (merged - base).double()
    along, total = transform.energies().get("w", (0.0, 0.0))
    assert total == pytest.approx(float(change.square().sum()))
    if not pull.is_uniform:  # by what is left: |D|^2 - |D'|^2 = (1 - omega^2) |D u|^2
        left = float((out.view(base.shape).double() - base.double()).square().sum())
        assert (1 - pull.omega**2) * along == pytest.approx(total - left, rel=1e-4, abs=1e-4 * (total + 1e-9))
    return out.view(base.shape)


SHAPES = [((5, 6), 1), ((6, 5), 0), ((3, 5, 6), 2), ((3, 6, 5), 1), ((1, 1), 0), ((1, 1), 1), ((2, 40), 1)]


@given(
    st.sampled_from(SHAPES), st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.booleans(), st.integers(0, 999)
)
def test_blocks_are_the_formula(
    shape: tuple[tuple[int, ...], int], grid: int, elements: int, omega: float, is_uniform: bool, seed: int
) -> None:
    sizes, dim = shape
    generator = torch.Generator().manual_seed(seed)
    base, merged = (torch.randn(sizes, generator=generator) for _ in range(2))
    stacked = len(sizes) > 2 and seed % 2 == 0
    mean = torch.randn((*(sizes[:1] if stacked else ()), sizes[dim]), generator=generator)
    if stacked:
        mean[1] = 0.0
    pull = MeanDirection(direction(mean), dim, omega, is_uniform)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directions, "GRID_ELEMENTS", grid)
        found = streamed(pull, base, merged, elements)
        assert_same_bits(streamed(pull, base, merged, 1), found)
    formula = reference.shortened if is_uniform else reference.protect_mean
    torch.testing.assert_close(found.double(), formula(base, merged, mean, omega, dim), rtol=1e-5, atol=1e-5)
    if stacked:
        assert torch.equal(found[1], merged[1])


@pytest.mark.parametrize("dim", [0, 1])
def test_an_output_that_is_not_finite_stays_as_merged(dim: int) -> None:
    merged = torch.ones(2, 3)
    merged[0, 1] = float("nan")
    merged = merged if dim else merged.T.contiguous()
    base = torch.zeros_like(merged)
    transform = Relaxation({"w": MeanDirection(direction(torch.ones(3)), dim, 0.0)}, torch.device("cpu"))
    region = Region(TensorSpec("w", tuple(base.shape)), 0, 6)
    block = Block(region, base.flatten(), [], [merged.flatten()])
    statistics = transform.measure(region.tensor, lambda look, regions=None: iter([look(block)]))
    out = transform(region, base.flatten(), merged.flatten(), statistics).view(base.shape)
    out = out if dim else out.T
    assert_same_bits(out[0].nan_to_num(7.0), torch.tensor([1.0, 7.0, 1.0]))
    torch.testing.assert_close(out[1], torch.zeros(3), rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------------------- whole commands


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_matrices_are_the_formulas_and_norms_are_relaxed_by_channel(
    architecture: str, family_of: Callable[[str], Relaxed], tmp_path: Path
) -> None:
    relaxed = family_of(architecture)
    ours = relaxed.perform(tmp_path / "out", "--omega", OMEGA)
    check(ours, relaxed, relaxed.merged)
    for wrong in (lambda b, m, u, o, d: reference.protect_mean(b, m, -u.roll(1, -1), o, d), reference.shortened):
        with pytest.raises(AssertionError):
            check(ours, relaxed, relaxed.merged, wrong)
    uniform = relaxed.perform(tmp_path / "uniform", "--omega", OMEGA, "--control", "uniform")
    matrices = {name: one for name, one in uniform.items() if one.dim() > 1}  # norms get their mean factor
    check({**ours, **matrices}, relaxed, relaxed.merged, reference.shortened)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_omega_1_is_the_merge_and_the_base_stays_the_base(
    architecture: str, family_of: Callable[[str], Relaxed], tmp_path: Path
) -> None:
    relaxed = family_of(architecture)
    for name, values in relaxed.perform(tmp_path / "one", "--omega", "1").items():
        assert_same_bits(values, load(relaxed.merged)[name].float(), where=name)
    itself = perform(
        relaxed.base, relaxed.base, tmp_path / "itself", "--activations", relaxed.saved, *MEAN, "--omega", "0"
    )
    for name, values in itself.items():
        assert_same_bits(values, load(relaxed.base)[name].float(), where=name)


@pytest.mark.parametrize(
    ("architecture", "control"),
    [
        ("llama", "none"),
        ("llama", "uniform"),
        ("mixtral", "random"),
        *(pytest.param(name, "none", marks=pytest.mark.slow) for name in ARCHITECTURES if name != "llama"),
    ],
)
def test_bytes_do_not_depend_on_workers_or_blocks(
    architecture: str,
    control: Any,
    family_of: Callable[[str], Relaxed],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    relaxed = family_of(architecture)
    for grid in (1000, 20):  # rows of 32 and more: of the second, none fits
        for module in (stream, directions):
            monkeypatch.setattr(module, "GRID_ELEMENTS", grid)
        found = set()
        for number, (workers, elements) in enumerate([(1, None), (3, 1000), (2, 90), (1, 23)]):
            options = RunOptions(stream=StreamOptions(workers=workers, block_elements=elements), quiet=True)
            merged, base = open_folder(relaxed.merged), open_folder(relaxed.base)
            how = Relaxing((Omega(OMEGA),), protect="mean", control=control)
            out = tmp_path / f"{grid}-{number}"
            relax_checkpoint(merged, base, load_activations(relaxed.saved), out, how, options)
            found.add(weight_bytes(out)["model.safetensors"])
        assert len(found) == 1


def test_a_sweep_is_its_single_runs_and_reads_matrices_once_more_where_it_must(
    family_of: Callable[[str], Relaxed], tmp_path: Path
) -> None:
    relaxed = family_of("gpt2")
    relaxed.perform(tmp_path / "sweep", "--omegas", "0,0.25,1")
    for omega in ("0", "0.25", "1"):
        relaxed.perform(tmp_path / omega, "--omega", omega)
        assert weight_bytes(tmp_path / "sweep" / f"omega_{omega}") == weight_bytes(tmp_path / omega)


@pytest.mark.command
@pytest.mark.skipif(not can_compile(), reason="no LLVM")
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("control", ["none", "uniform"])
def test_loops_merge_what_is_then_pulled_back(
    architecture: str,
    control: str,
    family_of: Callable[[str], Relaxed],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same bytes and energies as by torch alone, where matrices are measured first, too; also of what is merged at random."""
    blocks: list[bool] = []
    right = Loading.block
    monkeypatch.setattr(Loading, "block", lambda *given: blocks.append((made := right(*given)) is not None) or made)
    relaxed = family_of(architecture)
    names = ",".join(map(str, relaxed.family.models))
    written = []
    for compiled in (False, True):
        out = tmp_path / f"out{compiled}"
        recipe = make_recipe("dare_ties", str(relaxed.base), names, parameters={"density": 0.5})
        request = AimRequest(Relaxing((Omega(OMEGA),), protect="mean", control=control), statistics=relaxed.saved)  # type: ignore[arg-type]
        options = RunOptions(stream=StreamOptions(compiled=compiled, workers=2), report="none")
        run_merge(recipe, out, options, aim=request)
        energies = json.loads((out / "merge_recipe.json").read_text())["aim"]["along_mean"]
        written.append(((out / "model.safetensors").read_bytes(), energies))
        assert compiled or not blocks
    assert written[0] == written[1]
    assert blocks
    assert all(blocks)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_merging_and_relaxing_in_one_run(
    architecture: str, family_of: Callable[[str], Relaxed], tmp_path: Path
) -> None:
    relaxed = family_of(architecture)
    models = ",".join(map(str, relaxed.family.models))
    flags = [
        "--method",
        "ties",
        "--base_model",
        relaxed.base,
        "--models_to_merge",
        models,
        "--dtype",
        "float32",
        "--quiet",
    ]
    saved = ["--activations", relaxed.saved, "--omega", OMEGA, "--protect", "mean"]
    for out, more in (("plain", []), ("both", saved)):
        call(merge, *flags, "--save_path", tmp_path / out, *more)
    after = perform(relaxed.base, tmp_path / "plain", tmp_path / "after", *saved)
    both = load(tmp_path / "both")
    for name, values in after.items():
        assert_same_bits(both[name], values, where=name)
    check(both, relaxed, tmp_path / "plain")


def test_the_mean_input_gets_the_bases_answer(family_of: Callable[[str], Relaxed], tmp_path: Path) -> None:
    relaxed = family_of("llama")
    ours = relaxed.perform(tmp_path / "out", "--omega", "0")
    base, merged = load(relaxed.base), load(relaxed.merged)
    for name, (mean, _, _) in relaxed.inputs().items():
        if ours[name].dim() > 1:
            left, before = ((one[name].double() - base[name].double()) @ mean for one in (ours, merged))
            assert float(left.norm()) < 1e-4 * float(before.norm()), name


# ------------------------------------------------------------------------------------------------- what is said of it


def printed(of: Relaxed, out: Path, *flags: object) -> str:
    """What performAIM.py prints of a family."""
    command = ["--merged_model", of.merged, "--pretrained_model_name", of.base, "--save_path", out]
    return call(performAIM, *command, "--activations", of.saved, *MEAN, *flags).out


def test_report_recipe_and_card(family_of: Callable[[str], Relaxed], tmp_path: Path) -> None:
    relaxed = family_of("llama")
    said = printed(relaxed, tmp_path / "out", "--omega", "self_attn=1,norm=1,0")
    header = next(line for line in said.splitlines() if line.startswith("layer"))
    assert header.endswith("|mean|²/E|x|²")
    kind = "model.layers.*.mlp.down_proj"
    energy = {
        name: float(mean.square().sum() / square)
        for name, mean, square in (
            (
                name,
                one.mean(load(relaxed.base)[name].shape),
                float(one.statistics(load(relaxed.base)[name].shape)[1].sum()),
            )
            for name, one in reference.watch_inputs(relaxed.base, text_blocks()).items()
            if name.endswith("down_proj.weight")
        )
    }
    expected = sum(energy.values()) / len(energy)
    assert re.search(rf"^{re.escape(kind)} .* {expected:.3f}$", said, re.M)
    aim = json.loads((tmp_path / "out" / "merge_recipe.json").read_text())["aim"]
    assert aim["protect"] == "mean"
    assert aim["statistics"][f"{kind}.weight"]["mean_energy"] == pytest.approx(expected, rel=1e-3)
    base, merged, inputs = load(relaxed.base), load(relaxed.merged), relaxed.inputs()
    along, total = {}, {}
    for name in (name for name in inputs if "mlp" in name or "lm_head" in name):
        change, u = merged[name].double() - base[name].double(), reference.direction(inputs[name][0])
        along[name], total[name] = float((change @ u).square().sum()), float(change.square().sum())
    down = [name for name in along if "down_proj" in name]
    share = sum(along[name] for name in down) / sum(total[name] for name in down)
    assert aim["along_mean"][f"{kind}.weight"] == pytest.approx(share, rel=1e-3)
    assert re.search(rf"^{re.escape(kind)} +2 +\S+ +{100 * share:.1f} %$", said, re.M)
    kept = 1 - sum(along.values()) / sum(total.values())
    assert aim["energy_kept"] == pytest.approx(kept, rel=1e-3)
    assert "share_kept" not in aim
    count = len(along)
    assert f"{count} tensors relaxed" in said
    assert f"{100 * kept:.1f} % of their task vectors' squared length kept" in said
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`W = W_merged - (1 - omega) (D u) u^T`" in card
    assert "with omega self\\_attn=1,norm=1,0" in card or "with omega self_attn=1,norm=1,0" in card
    assert "arXiv:2502.02421" not in card


def test_a_recipe_s_block_is_the_flags(family_of: Callable[[str], Relaxed], tmp_path: Path) -> None:
    relaxed = family_of("llama")
    block = {"omega": OMEGA, "protect": "mean", "control": "random", "seed": 3, "statistics": str(relaxed.saved)}
    request = read_request(block)
    assert request == AimRequest(Relaxing((Omega(OMEGA),), protect="mean", control="random", seed=3), relaxed.saved)
    flags = ["--omega", OMEGA, "--control", "random", "--seed", "3"]
    relaxed.perform(tmp_path / "out", *flags)
    recorded = json.loads((tmp_path / "out" / "merge_recipe.json").read_text())["aim"]
    again = read_request(recorded | {"statistics": str(relaxed.saved)})
    assert again.relaxing == request.relaxing
    command = [
        "--method",
        "linear",
        "--base_model",
        relaxed.base,
        "--models_to_merge",
        relaxed.merged,
        "--dtype",
        "float32",
    ]
    recipe = tmp_path / "recipe.yml"
    aim = ["--activations", relaxed.saved, "--protect", "mean", *flags, "--write_config", recipe]
    call(merge, *command, *aim)
    call(merge, "--config", str(recipe), "--save_path", str(tmp_path / "merged"), "--quiet")
    assert weight_bytes(tmp_path / "merged") == weight_bytes(tmp_path / "out")
    make = make_recipe("linear", str(relaxed.base), str(relaxed.merged), out_dtype="float32")
    from merging import merge as merge_models

    merge_models(make, tmp_path / "python", aim=request)
    assert weight_bytes(tmp_path / "python") == weight_bytes(tmp_path / "out")


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_experts_without_a_token_stay_as_merged(
    architecture: str, family_of: Callable[[str], Relaxed], tmp_path: Path
) -> None:
    relaxed = family_of(architecture)
    activations = calibrate_on(relaxed.base, torch.tensor([[17]]))
    activations.save(tmp_path / "one")
    few = replace(relaxed, saved=tmp_path / "one")
    said = printed(few, tmp_path / "out", "--omega", "0")
    ours, merged = load(tmp_path / "out"), load(relaxed.merged)
    if architecture == "mixtral":
        assert "its module saw no token" in said
        for name in activations.silent:
            assert_same_bits(ours[name], merged[name].float(), where=name)
        return
    name = "model.layers.0.mlp.experts.down_proj"
    idle = activations.statistics[name].tokens == 0
    assert torch.equal(ours[name][idle], merged[name][idle].float())
    assert all(not torch.equal(ours[name][e], merged[name][e].float()) for e in (~idle).nonzero().flatten().tolist())
    assert "2 of its 4 experts, which saw no token or have a mean input of 0" in said


def test_a_mean_of_zero_leaves_the_tensor_as_merged(family_of: Callable[[str], Relaxed], tmp_path: Path) -> None:
    relaxed = family_of("llama")
    activations = load_activations(relaxed.saved)
    name = "model.layers.1.mlp.up_proj.weight"
    one = activations.statistics[name]
    balanced = replace(one, mean=torch.zeros_like(one.mean_abs))
    replace(activations, statistics={**activations.statistics, name: balanced}).save(tmp_path / "balanced")
    said = printed(replace(relaxed, saved=tmp_path / "balanced"), tmp_path / "out")
    assert "1 x model.layers.*.mlp.up_proj.weight (its mean input is 0)" in said
    assert_same_bits(load(tmp_path / "out")[name], load(relaxed.merged)[name].float())


def without_means(activations: Activations) -> Activations:
    """Statistics as schema 1 had them."""
    old = {name: replace(one, mean=None, after_first=None) for name, one in activations.statistics.items()}
    return replace(activations, statistics=old)


def test_statistics_without_signed_means_are_refused_by_name(
    family_of: Callable[[str], Relaxed], tmp_path: Path
) -> None:
    relaxed = family_of("llama")
    without_means(load_activations(relaxed.saved)).save(tmp_path / "old")
    flags = ["--activations", tmp_path / "old", "--protect", "mean"]
    said = attempt(relaxed.base, relaxed.merged, tmp_path / "out", *flags, code=1).err
    assert f"--activations {tmp_path / 'old'}: lm_head.weight: expected the signed mean of its input" in said
    assert (
        "which --protect mean needs, got none, as in files of schema 1. Calibrate again, or use --protect channels."
        in said
    )
    assert not (tmp_path / "out").exists()
    attempt(relaxed.base, relaxed.merged, tmp_path / "out", "--activations", tmp_path / "old")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"protect": "means"}, "protect: unknown value 'means'. Did you mean 'mean'? Known: channels, mean."),
        ({"control": "random"}, "control random: protect channels has no direction that could be drawn. Use control permuted, or protect mean."),
        ({"protect": "mean", "scaling": "sqrt"}, "scaling: protect mean has no s to scale. Leave it out, or use protect channels."),
        ({"protect": "mean", "numerics": "reference"}, "numerics reference: the published program has no protect mean. Use numerics float32, or protect channels."),
    ],
)  # fmt: skip
def test_what_excludes_each_other(given: dict[str, Any], says: str) -> None:
    with pytest.raises(Refusals) as refused:
        Relaxing(**given)
    assert [str(problem) for problem in refused.value.problems] == [says]


def test_figures_show_the_mean(family_of: Callable[[str], Relaxed], tmp_path: Path) -> None:
    relaxed = family_of("llama")
    texts = write_texts(tmp_path)
    flags = ["--protect", "mean", "--figures", tmp_path / "figures", "--save_activations", tmp_path / "saved"]
    perform(relaxed.base, relaxed.merged, tmp_path / "out", *flags, texts=texts)
    written = {path.name for path in (tmp_path / "figures").iterdir()}
    names = ("importance_layers", "importance_sorted", "massive_activations", "mean_input", "mean_direction")
    assert written == {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}
    assert b"|mean|" in (tmp_path / "figures" / "mean_input.svg").read_bytes()
