"""Massive activations: reported, left out of s with the first token, or left alone by a control."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aim.activations import Activations, ChannelStatistics, Means, load_activations
from aim.choices import Relaxing
from aim.formula import drop_top
from aim.relaxation import ChannelFactors, importance_of, spread
from aim.summary import format_summaries, massive_of, summarise
from checkpoints.errors import Refusals
from streaming.blocks import Region, TensorSpec
from tests.aim_runs import attempt, make_family, perform, write_texts
from tests.pico import Family

LOUD = 5
OMEGA = 0.25


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A llama one of whose residual channels is huge at the first token, by its embedding of the token that begins each text."""
    return make_family(tmp_path_factory.mktemp("family"), "llama")


@pytest.fixture(scope="module")
def saved(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    path = folder / "statistics.safetensors"
    perform(family.base, family.models[0], folder / "out", "--save_activations", path, texts=write_texts(folder))
    return path


def made(rows: Tensor) -> ChannelStatistics:
    """Statistics of blocks of tokens, `[blocks, tokens, in]`, computed here."""

    def means(x: Tensor) -> Means:
        x = x.double().flatten(0, 1)
        return Means(*(m.float() for m in (x.abs().mean(0), x.square().mean(0))), torch.tensor(len(x)), x.mean(0).float())  # fmt: skip

    highest, at = rows.abs().amax(dim=0).max(dim=0)
    return ChannelStatistics(**vars(means(rows)), max_abs=highest, max_at=at, after_first=means(rows[:, 1:]))


@pytest.fixture
def loud() -> ChannelStatistics:
    rows = torch.randn(4, 16, 12, generator=torch.Generator().manual_seed(0))
    rows[:, 0, LOUD] *= 20_000
    return made(rows)


def test_the_largest_activation_is_found_with_its_token(loud: ChannelStatistics) -> None:
    found = massive_of(loud)
    assert found is not None
    assert loud.max_abs is not None
    assert (found.channel, found.token) == (LOUD, 0)
    assert found.largest == float(loud.max_abs[LOUD]) > 1000
    assert found.median == float(loud.max_abs.median())
    assert found.rest is not None
    assert found.rest < 0.01
    table = format_summaries(summarise({"layers.0.w": loud.mean_abs}, statistics={"layers.0.w": loud}))
    assert "Massive activations, 100 times the largest |x| of the median channel or more:" in table
    last = table.splitlines()[-1].split()
    assert last[:4] == ["layers.*.w", f"{found.largest:,.1f}", str(LOUD), "0"]


def test_none_is_said_to_be_massive_where_none_is(loud: ChannelStatistics) -> None:
    quiet = made(torch.randn(4, 16, 12, generator=torch.Generator().manual_seed(1)))
    table = format_summaries(summarise({"w": quiet.mean_abs}, statistics={"w": quiet}))
    assert table.endswith("massive activations: none is 100 times the largest |x| of its tensor's median channel")
    old = ChannelStatistics(loud.mean_abs, loud.mean_sq, loud.tokens)
    assert "assive" not in format_summaries(summarise({"w": old.mean_abs}, statistics={"w": old}))


def test_s_without_the_first_token(loud: ChannelStatistics) -> None:
    activations = Activations({"w": loud}, "base", {})
    assert loud.after_first is not None
    s = loud.after_first.mean_abs / loud.after_first.mean_abs.max()
    for scaling, expected in (("after_first", s), ("after_first_sqrt", s.sqrt()), ("after_first_square", s.square())):
        torch.testing.assert_close(importance_of(activations, "w", scaling), expected)  # type: ignore[arg-type]
    with_it = importance_of(activations, "w")
    assert with_it[LOUD] == 1
    assert float(with_it.median()) < 0.01 < float(s.median())


def test_the_top_channels_are_those_that_stand_out_or_the_largest() -> None:
    s = torch.tensor([[0.02, 1.0, 0.03, 0.5, 0.02], [0.5, 0.4, 1.0, 0.6, 0.7], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(drop_top(s), torch.tensor([[0.02, 0, 0.03, 0, 0.02], [0.5, 0.4, 0, 0.6, 0.7], [0.0] * 5]))


def test_spread_puts_channels_where_they_lie() -> None:
    for shape, dim, lead in (((4, 6), 1, None), ((4, 6), 0, None), ((3, 4, 6), 0, None), ((3, 4, 6), 1, 3), ((2, 3, 4, 5), 1, None)):  # fmt: skip
        width = shape[dim]
        values = torch.arange(float(width * (lead or 1))).view(*([lead] if lead else []), width)
        sizes = [shape[axis] if axis == dim or (lead and axis == 0) else 1 for axis in range(len(shape))]
        whole = values.reshape(sizes).expand(shape).reshape(-1, *shape[-2:])
        assert torch.equal(spread(values, dim, shape).expand_as(whole), whole)
    joined = torch.arange(24.0)  # both of the last dimensions
    assert torch.equal(spread(joined, 1, (3, 4, 6)).expand(3, 4, 6), joined.view(1, 4, 6).expand(3, 4, 6))
    region = Region(TensorSpec("w", (3, 4, 6)), 24 + 6, 24 + 18)  # rows 1 and 2 of the second matrix
    assert torch.equal(ChannelFactors(joined, 1).of(region), joined.view(1, 4, 6)[:, 1:3])
    assert torch.equal(ChannelFactors(torch.arange(3.0), 0).of(region), torch.ones(1, 1, 1))


def relaxed(family: Family, saved: Path, out: Path, *flags: str) -> dict[str, Tensor]:
    perform(
        family.base, family.models[0], out, "--activations", saved, "--omega", str(OMEGA), "--dtype", "float32", *flags
    )
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("flags", [("--scaling", "after_first_sqrt"), ("--control", "without_top")])
def test_the_command_relaxes_by_the_formula(
    flags: tuple[str, str], family: Family, saved: Path, tmp_path: Path
) -> None:
    got = relaxed(family, saved, tmp_path / "out", *flags)
    base, merged = (load_file(folder / "model.safetensors") for folder in (family.base, family.models[0]))
    statistics = load_activations(saved)
    for name, channels in statistics.statistics.items():
        assert channels.after_first is not None
        if flags[1] == "without_top":
            s = channels.mean_abs / channels.mean_abs.max()
            s = torch.where((s >= 10 * s.median()) | (s == 1), 0.0, s)
        else:
            s = (channels.after_first.mean_abs / channels.after_first.mean_abs.max()).sqrt()
        before, change = base[name].double(), merged[name].double() - base[name].double()
        wanted = before + change * (1 - s.double() * (1 - OMEGA))
        torch.testing.assert_close(got[name].double(), wanted, rtol=1e-5, atol=1e-6)
    record = json.loads((tmp_path / "out" / "merge_recipe.json").read_text())["aim"]
    assert record[flags[0][2:]] == flags[1]
    largest = record["statistics"]["model.layers.*.mlp.down_proj.weight"]["largest_abs"]
    assert set(largest) == {"largest", "channel", "token", "median_channel", "mean_after_first_against_mean"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("which leaves the most active channels out" in card) == (flags[1] == "without_top")


def test_a_file_without_the_means_is_refused_by_name(family: Family, saved: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(saved, "pt") as file:  # type: ignore[no-untyped-call]
        metadata = file.metadata() | {"schema": "aim-activations/1"}
    kept = {name: one for name, one in load_file(saved).items() if name.endswith((".mean_abs", ".mean_sq", ".tokens")) and "after_first" not in name}  # fmt: skip
    old = tmp_path / "old.safetensors"
    save_file(kept, old, metadata)
    relaxed(family, old, tmp_path / "out")  # what it has is read
    where = ["--activations", old, "--scaling", "after_first"]
    ended = attempt(family.base, family.models[0], tmp_path / "other", *where, code=1)
    assert (
        "expected the mean |x| without the first token of each block, which --scaling after_first needs, got none, as in files of "
        "schema 1 and of models that do not read from left to right. Calibrate again, or use --scaling identity."
        in ended.err
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"control": "without_top", "protect": "mean"},
            "control without_top: protect mean knows no channels, of which the top ones could be left out. Use control permuted, or "
            "protect channels.",
        ),
        (
            {"scaling": "after_first", "numerics": "reference"},
            "numerics reference: the published program has no scaling after_first. Use numerics float32, or scaling identity.",
        ),
    ],
)
def test_what_excludes_each_other(values: dict[str, str], message: str) -> None:
    with pytest.raises(Refusals) as error:
        Relaxing(**values)  # type: ignore[arg-type]
    assert str(error.value) == message


def test_groups_of_rows_have_factors_of_their_own() -> None:
    values = torch.arange(12.0).view(2, 6)  # for the rows 0 to 3, and 4 to 7
    spec = TensorSpec("w", (8, 6))
    factors = ChannelFactors(values, 1)
    whole = values.repeat_interleave(4, dim=0)
    assert torch.equal(factors.of(Region(spec, 0, 48))[0], whole)
    assert torch.equal(factors.of(Region(spec, 18, 36))[0], whole[3:6])
    assert torch.equal(factors.of(Region(spec, 26, 29))[0], whole[4:5, 2:5])  # a piece of a row
    assert factors.formula(spec) is None
