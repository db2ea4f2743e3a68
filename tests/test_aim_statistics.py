"""Statistics of every architecture against plain float64, whose inputs are found without hooks; and the hooks themselves."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import aim.calibrate
import aim.sums
from aim import passes
from aim.activations import Activations, ChannelStatistics, load_activations
from aim.sums import Sums, add_on_gpu
from aim.targets import Selection, select_targets
from aim.watcher import Target, Watcher
from checkpoints.errors import InputError
from tests.aim_runs import ARCHITECTURES, calibrate_on, embeddings, make_family, open_folder, random_tokens
from tests.reference import aim as reference
from tests.reference.aim import Seen

TOLERANCE = 1e-5
"""Relative, of a float32 forward against a float64 one; 1e-6 is usual."""
TOKENS = random_tokens()
MEANS = ("mean_abs", "mean_sq", "mean", "tokens")
KEYS = (*MEANS, "max_abs", "max_at", *(f"after_first.{key}" for key in MEANS))
TIED = {"qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "falcon", "bloom"}


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Architecture -> the folder of a pico base model."""
    return cache(lambda name: make_family(tmp_path_factory.mktemp(name), name, n_models=0).base)


@pytest.fixture(scope="module")
def ours_of(base_of: Callable[[str], Path]) -> Callable[[str], Activations]:
    """Architecture -> its statistics on TOKENS."""
    return cache(lambda name: calibrate_on(base_of(name), TOKENS, batch_size=3))


@pytest.fixture(scope="module")
def seen_of(base_of: Callable[[str], Path]) -> Callable[[str], dict[str, Seen]]:
    """Architecture -> the inputs that the reference saw on TOKENS."""
    return cache(lambda name: reference.watch_inputs(base_of(name), TOKENS))


def check_statistics(ours: ChannelStatistics, input_dim: int, seen: Seen, shape: Sequence[int]) -> None:
    """Raise AssertionError where the statistics of a tensor of `shape` are not those of the inputs that were seen."""
    assert input_dim == seen.input_dim
    mean_abs, mean_sq, tokens = seen.statistics(shape)
    assert ours.tokens.dtype == torch.int64
    assert torch.equal(ours.tokens, tokens)
    for got, expected in ((ours.mean_abs, mean_abs), (ours.mean_sq, mean_sq)):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=TOLERANCE, atol=0)


# Every architecture


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_statistics_are_those_of_what_is_multiplied(
    architecture: str,
    base_of: Callable[[str], Path],
    ours_of: Callable[[str], Activations],
    seen_of: Callable[[str], dict[str, Seen]],
) -> None:
    base, ours, seen = open_folder(base_of(architecture)), ours_of(architecture), seen_of(architecture)
    selection = select_targets(base)
    # Everything that has an input has statistics; a head that is the embedding stays out.
    assert set(seen) - set(ours.statistics) == ({base.architecture.input_embedding} if architecture in TIED else set())
    assert set(ours.statistics) == set(selection.targets) == set(seen) - set(embeddings(seen))
    assert not ours.silent
    for name, statistics in ours.statistics.items():
        check_statistics(statistics, selection.input_dims[name], seen[name], base.weights.tensors[name].shape)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "mixtral", "gpt_oss"])
def test_signed_means_peaks_and_what_follows_the_first_token(
    architecture: str,
    base_of: Callable[[str], Path],
    ours_of: Callable[[str], Activations],
    seen_of: Callable[[str], dict[str, Seen]],
) -> None:
    ours, seen, stored = (
        ours_of(architecture),
        seen_of(architecture),
        load_file(base_of(architecture) / "model.safetensors"),
    )
    first = reference.watch_inputs(base_of(architecture), TOKENS[:, :1])
    for name, statistics in ours.statistics.items():
        experts = range(stored[name].shape[0]) if None not in seen[name].rows else [None]
        for expert in experts:
            one = statistics.tensors() if expert is None else {k: v[expert] for k, v in statistics.tensors().items()}
            rows = torch.cat(seen[name].rows[expert])
            scale = rows.abs().mean(0).max()
            torch.testing.assert_close(one["mean"].double(), rows.mean(0), rtol=0, atol=1e-5 * scale)
            torch.testing.assert_close(one["max_abs"].double(), rows.abs().amax(0), rtol=TOLERANCE, atol=0)
            ahead = first[name].rows.get(expert, []) if name in first else []  # of an expert perhaps none
            starts = torch.cat([rows[:0], *ahead])
            assert one["after_first.tokens"] == len(rows) - len(starts)
            for key, of in (("mean_abs", torch.abs), ("mean_sq", torch.square), ("mean", torch.clone)):
                rest = (of(rows).sum(0) - of(starts).sum(0)) / max(1, len(rows) - len(starts))
                got = one[f"after_first.{key}"].double()
                torch.testing.assert_close(got, rest, rtol=0, atol=1e-5 * of(rows).abs().mean(0).max())
            if expert is None and "router" not in name and "gate.weight" not in name and architecture != "mixtral":
                per_token = len(rows) // TOKENS.numel()
                position = rows.abs().argmax(0) // per_token % TOKENS.shape[1]
                assert (one["max_at"] == position).double().mean() > 0.95  # but for ties within rounding
                assert one["max_at"].min() >= 0


def test_what_has_no_input_is_listed_with_the_reason(base_of: Callable[[str], Path]) -> None:
    def reasons(architecture: str) -> dict[str, str]:
        return dict(select_targets(open_folder(base_of(architecture))).skipped)

    kept = reasons("gpt2")
    assert {name for name, why in kept.items() if why == "an embedding"} == {
        "transformer.wte.weight",
        "transformer.wpe.weight",
    }
    assert {why for name, why in kept.items() if name.endswith(".bias")} == {"a bias"}
    assert reasons("gpt_oss")["model.layers.0.self_attn.sinks"] == "takes part in no matrix product"
    assert reasons("llama") == {"model.embed_tokens.weight": "an embedding"}


@pytest.mark.parametrize(
    ("architecture", "by_hand"), [("llama", reference.llama_inputs), ("gpt2", reference.gpt2_inputs)]
)
def test_statistics_are_those_of_layers_computed_by_hand(
    architecture: str,
    by_hand: Callable[[Path, Tensor], dict[str, Tensor]],
    base_of: Callable[[str], Path],
    ours_of: Callable[[str], Activations],
) -> None:
    folder, ours = base_of(architecture), ours_of(architecture)
    inputs, stored = by_hand(folder, TOKENS), load_file(folder / "model.safetensors")
    dims = select_targets(open_folder(folder)).input_dims
    assert set(inputs) == set(ours.statistics)
    for name, x in inputs.items():
        dim = 0 if architecture == "gpt2" or x.dim() == 1 else stored[name].dim() - 1
        seen = Seen(dim, {None: [x.reshape(-1, x.shape[-1])]})
        check_statistics(ours.statistics[name], dims[name], seen, stored[name].shape)
        assert int(ours.statistics[name].tokens) == TOKENS.numel()


def test_comparison_notices_a_wrong_axis_and_a_flipped_sign(
    base_of: Callable[[str], Path], ours_of: Callable[[str], Activations], seen_of: Callable[[str], dict[str, Seen]]
) -> None:
    for architecture, name in (
        ("llama", "model.layers.1.self_attn.o_proj.weight"),
        ("gpt2", "transformer.h.1.attn.c_proj.weight"),
    ):
        weight = load_file(base_of(architecture) / "model.safetensors")[name]
        assert weight.shape == (32, 32)  # square: sizes tell nothing
        ours, seen = ours_of(architecture).statistics[name], seen_of(architecture)[name]
        check_statistics(ours, seen.input_dim, seen, weight.shape)
        matrix = weight.double() if seen.input_dim == 0 else weight.double().T
        outputs = Seen(seen.input_dim, {None: [x @ matrix for x in seen.rows[None]]})
        with pytest.raises(AssertionError):
            check_statistics(ours, 1 - seen.input_dim, seen, weight.shape)
        with pytest.raises(AssertionError):  # output channels
            check_statistics(ours, seen.input_dim, outputs, weight.shape)
        with pytest.raises(AssertionError):
            check_statistics(replace(ours, mean_abs=-ours.mean_abs), seen.input_dim, seen, weight.shape)
        signed = torch.cat(seen.rows[None]).mean(0).float()  # mean x, not mean |x|
        with pytest.raises(AssertionError):
            check_statistics(replace(ours, mean_abs=signed), seen.input_dim, seen, weight.shape)
        with pytest.raises(AssertionError):
            check_statistics(replace(ours, tokens=ours.tokens - 1), seen.input_dim, seen, weight.shape)


def test_tokens_of_per_head_norms_and_of_experts(ours_of: Callable[[str], Activations]) -> None:
    tokens = {name: one.tokens for name, one in ours_of("qwen3").statistics.items()}
    assert tokens["model.layers.0.self_attn.q_norm.weight"] == TOKENS.numel() * 4
    assert tokens["model.layers.0.self_attn.k_norm.weight"] == TOKENS.numel() * 2
    tokens = {name: one.tokens for name, one in ours_of("mixtral").statistics.items()}
    for part in ("w1", "w2", "w3"):
        each = [tokens[f"model.layers.1.block_sparse_moe.experts.{e}.{part}.weight"] for e in range(4)]
        assert sum(each) == TOKENS.numel() * 2
        assert len(set(map(int, each))) > 1  # each expert has its own
    tokens = {name: one.tokens for name, one in ours_of("gpt_oss").statistics.items()}
    assert tokens["model.layers.1.mlp.experts.down_proj"].shape == (4,)
    assert tokens["model.layers.1.mlp.experts.down_proj"].sum() == TOKENS.numel() * 2


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "mixtral"])
def test_statistics_do_not_depend_on_batches_or_on_the_order_of_blocks(
    architecture: str, base_of: Callable[[str], Path], ours_of: Callable[[str], Activations]
) -> None:
    expected = ours_of(architecture)
    others = [calibrate_on(base_of(architecture), TOKENS, batch_size=size) for size in (1, 4)]
    others.append(calibrate_on(base_of(architecture), TOKENS.flip(0), batch_size=3))
    for other in others:
        for name, statistics in expected.statistics.items():
            assert torch.equal(other.statistics[name].tokens, statistics.tokens)
            for key in ("mean_abs", "mean_sq"):
                got, wanted = getattr(other.statistics[name], key), getattr(statistics, key)
                assert (got - wanted).abs().max() <= 1e-6 * wanted.max()  # s is measured against the largest


def test_an_expert_that_no_token_was_sent_to_has_no_statistics(base_of: Callable[[str], Path]) -> None:
    one = torch.tensor([[17]])  # one token goes to two experts of four
    seen = reference.watch_inputs(base_of("mixtral"), one)
    ours = calibrate_on(base_of("mixtral"), one)
    assert set(ours.statistics) == set(seen)
    assert len(ours.silent) == 2 * 2 * 3  # layers, experts, matrices
    assert set(ours.silent.values()) == {"its module saw no token"}
    assert set(ours.silent) | set(seen) == set(select_targets(open_folder(base_of("mixtral"))).targets)
    fused = calibrate_on(base_of("gpt_oss"), one).statistics["model.layers.0.mlp.experts.gate_up_proj"]
    assert sorted(fused.tokens.tolist()) == [0, 0, 1, 1]
    assert torch.equal(fused.mean_abs.amax(dim=-1) > 0, fused.tokens > 0)


def test_offloaded_weights_are_watched_too(
    monkeypatch: pytest.MonkeyPatch, base_of: Callable[[str], Path], ours_of: Callable[[str], Activations]
) -> None:
    load = passes.load
    here = torch.device("cpu")
    monkeypatch.setattr(
        passes,
        "load",
        lambda *args, **options: accelerate.cpu_offload(load(*args, **options), execution_device=here),
    )
    for architecture in ("llama", "mixtral"):
        offloaded, expected = calibrate_on(base_of(architecture), TOKENS, batch_size=3), ours_of(architecture)
        assert not offloaded.silent
        assert all(torch.equal(offloaded.statistics[n].mean_abs, s.mean_abs) for n, s in expected.statistics.items())


# Bad numbers


def edited(folder: Path, out: Path, name: str, change: Callable[[Tensor], Any]) -> Path:
    """A copy of a checkpoint with one tensor changed in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    out.mkdir()
    for path in folder.iterdir():
        if path.suffix == ".json":
            (out / path.name).write_bytes(path.read_bytes())
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_an_infinity_in_a_statistic_names_the_module(tmp_path: Path, base_of: Callable[[str], Path]) -> None:
    name = "model.layers.1.mlp.gate_proj.weight"
    broken = edited(base_of("llama"), tmp_path / "base", name, lambda w: w[0].fill_(torch.inf))
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.down_proj: its input holds NaN or an infinity"):
        calibrate_on(broken, TOKENS)


def test_an_input_of_zeros_has_no_importance(tmp_path: Path, base_of: Callable[[str], Path]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    silent = calibrate_on(edited(base_of("llama"), tmp_path / "base", name, lambda w: w.zero_()), TOKENS).silent
    assert silent == {"model.layers.1.mlp.down_proj.weight": "its module's input is zero throughout"}


# The hooks


class Toy(nn.Module):
    """Two layers on one input, a third on what may be the same memory, a fourth that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3, bias=False)
        self.second = nn.Linear(4, 5, bias=False)
        self.third = nn.Linear(4, 2, bias=False)
        self.unused = nn.Linear(4, 2)
        self.between: Callable[[Tensor], Tensor] = lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        self.first(x)
        self.second(input=x)  # by keyword
        return self.third(self.between(x))


def targets() -> dict[str, Target]:
    shapes = {"first": (3, 4), "second": (5, 4), "third": (2, 4), "unused": (2, 4)}
    return {name: Target(f"{name}.weight", (0, 1), shape) for name, shape in shapes.items()}


def watch(model: Toy, inputs: list[Tensor]) -> tuple[dict[str, ChannelStatistics], dict[str, str]]:
    watcher = Watcher(model, targets())
    with watcher.watching(), torch.no_grad():
        for x in inputs:
            model(x)
    statistics, _, silent = watcher.results()
    return statistics, silent


def mean_abs(rows: list[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1, 4) for x in rows]).abs().mean(0)


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of all inputs that are summed."""
    seen = []
    real = aim.sums.add_rows

    def counted(x: Tensor, *others: Any) -> None:
        seen.append(x.shape)
        real(x, *others)

    monkeypatch.setattr(aim.sums, "add_rows", counted)
    return seen


def test_an_input_that_modules_share_is_summed_once(sums: list[torch.Size], base_of: Callable[[str], Path]) -> None:
    x = torch.randn(2, 7, 4)
    found, silent = watch(Toy(), [x])
    assert sums == [(1, 14, 4)]
    for name in ("first", "second", "third"):
        torch.testing.assert_close(found[name].mean_abs, mean_abs([x]))
        assert found[name].tokens == 14
    assert silent == {"unused": "its module saw no token"}
    sums.clear()
    calibrate_on(base_of("llama"), TOKENS[:2])
    # A layer's inputs: two norms, q k v, o, gate and up, down; then the last norm and the head. Two blocks of two layers.
    assert len(sums) == 2 * (2 * 6 + 2)


def test_an_input_changed_in_place_is_summed_again(sums: list[torch.Size]) -> None:
    model = Toy()
    model.between = lambda x: x.mul_(3)
    x = torch.randn(6, 4)
    before = x.clone()
    found, _ = watch(model, [x])
    assert len(sums) == 2
    torch.testing.assert_close(found["second"].mean_abs, mean_abs([before]))
    torch.testing.assert_close(found["third"].mean_abs, mean_abs([before]) * 3)


def test_inputs_in_reused_memory_are_not_taken_for_one(sums: list[torch.Size]) -> None:
    model = Toy()
    model.between = lambda x: x * 0 + 2  # a new tensor, whose memory the next call may reuse
    inputs = [torch.full((64, 4), float(value)) for value in range(1, 6)]
    found, _ = watch(model, inputs)
    assert len(sums) == 2 * len(inputs)
    torch.testing.assert_close(found["first"].mean_abs, torch.full((4,), 3.0))
    torch.testing.assert_close(found["third"].mean_abs, torch.full((4,), 2.0))


@pytest.mark.parametrize("apart", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])
def test_weights_that_share_an_input_only_sometimes(apart: tuple[int, ...]) -> None:
    """Passes in which the third layer has the others' input, and passes (`apart`) in which it has one of its own."""
    model = Toy()
    inputs = [torch.randn(5, 4) * 10**number for number in range(3)]
    own = [torch.randn(5, 4) * 10**number for number in range(3)]
    watcher = Watcher(model, targets())
    with watcher.watching(), torch.no_grad():
        for number, x in enumerate(inputs):
            model.between = lambda x, number=number: own[number] if number in apart else x  # type: ignore[misc]
            model(x)
    found = watcher.results()[0]
    third = [own[number] if number in apart else x for number, x in enumerate(inputs)]
    for name, rows in (("first", inputs), ("second", inputs), ("third", third)):
        torch.testing.assert_close(found[name].mean_abs, mean_abs(rows))
        torch.testing.assert_close(found[name].max_abs, torch.cat(rows).abs().amax(dim=0))
        assert found[name].tokens == 15
    again = Watcher(model, targets())
    again.restore(watcher.sums())
    with again.watching(), torch.no_grad():
        model.between = lambda x: x
        model(inputs[0])
    for name, rows in (("first", inputs), ("second", inputs), ("third", third)):
        torch.testing.assert_close(again.results()[0][name].mean_abs, mean_abs([*rows, inputs[0]]))


def test_one_input_seen_twice_is_counted_twice() -> None:
    model = Toy()
    x = torch.randn(5, 4)
    found, _ = watch(model, [x, x])
    for name in ("first", "second", "third"):
        assert found[name].tokens == 10
        torch.testing.assert_close(found[name].mean_abs, mean_abs([x]))


def test_a_massive_first_token_takes_no_digits_from_the_others() -> None:
    """|x| of 30,000 beside 1: its square, 9e8, would leave sums of squares in float32 no digit of the rest."""
    x = torch.ones(2, 40, 4)
    x[:, 0] = 30000.0
    model = Toy()
    watcher = Watcher(model, targets())
    watcher.block = (2, 40)
    with watcher.watching(), torch.no_grad():
        model(x)
    one = watcher.results()[0]["first"]
    assert one.after_first is not None
    assert one.after_first.mean_sq.tolist() == [1.0] * 4
    assert one.after_first.tokens == 78
    assert one.mean_sq[0] == pytest.approx((9e8 * 2 + 78) / 80)
    assert one.max_at is not None
    assert one.max_at.tolist() == [0] * 4


def test_inputs_are_let_go_and_hooks_removed_even_after_a_failure(sums: list[torch.Size]) -> None:
    model, failing = Toy(), Toy()
    x = torch.randn(3, 4)
    alive = weakref.ref(x)
    watcher = Watcher(model, targets())
    with watcher.watching(), torch.no_grad():
        model(x)
    del x
    gc.collect()
    assert alive() is None
    failing.between = lambda x: x[:, :3]
    with pytest.raises(RuntimeError), Watcher(failing, targets()).watching():
        failing(torch.randn(3, 4))
    sums.clear()
    failing.between = lambda x: x
    for one in (model, failing):
        one(torch.randn(3, 4))
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in one.modules())
    assert sums == []


def test_watching_does_not_change_the_output(base_of: Callable[[str], Path]) -> None:
    for architecture in ("gpt2", "mixtral"):
        base = open_folder(base_of(architecture))
        model = passes.load(base)
        if architecture == "mixtral":
            model.set_experts_implementation("eager")
        with torch.no_grad():
            expected = model(input_ids=TOKENS).logits
            with Watcher(model, select_targets(base).targets).watching():
                assert torch.equal(model(input_ids=TOKENS).logits, expected)
            assert torch.equal(model(input_ids=TOKENS).logits, expected)


def test_sums_are_float32_or_better_whatever_the_input_is() -> None:
    x = torch.full((3, 5000, 4), 1.0078125, dtype=torch.bfloat16)  # summed in bfloat16, this ends at 256
    found, _ = watch(Toy().to(torch.bfloat16), [x, x])
    assert found["first"].tokens == 30000
    torch.testing.assert_close(found["first"].mean_abs, torch.full((4,), 1.0078125), rtol=1e-6, atol=0)
    torch.testing.assert_close(found["first"].mean_sq, torch.full((4,), 1.0078125**2), rtol=1e-6, atol=0)


def test_an_input_of_another_width_is_no_channel_of_a_norm() -> None:
    model = nn.Sequential(nn.LayerNorm(4))
    model[0].forward = lambda x: x  # type: ignore[method-assign]
    watcher = Watcher(model, {"norm": Target("0.weight", (0,), (4,))})
    with watcher.watching(), torch.no_grad():
        model(torch.randn(2, 9))
    assert watcher.results()[2]["norm"] == "its module's input has 9 channels, the weight 4"


# The file


def test_the_file_has_the_documented_keys_and_comes_back_the_same(
    tmp_path: Path, ours_of: Callable[[str], Activations], base_of: Callable[[str], Path]
) -> None:
    ours = replace(ours_of("gpt_oss"), silent={"some.tensor": "its module saw no token"})
    ours.save(tmp_path / "a")
    ours.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", "pt") as file:
        assert set(file.keys()) == {f"{name}.{key}" for name in ours.statistics for key in KEYS}
        fused = "model.layers.0.mlp.experts.gate_up_proj"
        assert file.get_tensor(f"{fused}.mean_abs").shape == (4, 32)
        assert file.get_tensor(f"{fused}.mean_abs").dtype == file.get_tensor(f"{fused}.mean_sq").dtype == torch.float32
        assert file.get_tensor(f"{fused}.tokens").dtype == torch.int64
        assert file.get_tensor("model.norm.weight.tokens").shape == ()
    back = load_activations(tmp_path / "a")
    assert (back.base, back.silent, back.calibration) == (ours.base, ours.silent, ours.calibration)
    assert set(back.statistics) == set(ours.statistics)
    for name, statistics in ours.statistics.items():
        found = back.statistics[name].tensors()
        assert found.keys() == set(KEYS)
        assert all(torch.equal(found[key], value) for key, value in statistics.tensors().items())
    assert back.input_dims == ours.input_dims
    assert ours.calibration["block_size"] == TOKENS.shape[1]
    assert (ours.calibration["blocks"], ours.calibration["dtype"]) == (len(TOKENS), "float32")


def test_a_file_of_schema_1_is_read_for_what_it_has(tmp_path: Path, ours_of: Callable[[str], Activations]) -> None:
    ours = ours_of("llama")
    ours.save(tmp_path / "new")
    with safe_open(tmp_path / "new", "pt") as file:
        old = {
            key: file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118
            if key.rpartition(".")[2] in ("mean_abs", "mean_sq", "tokens")
        }
        metadata = {key: value for key, value in file.metadata().items() if key != "input_dims"}
    old = {key: value for key, value in old.items() if ".after_first." not in key}
    save_file(old, tmp_path / "old", metadata | {"schema": "aim-activations/1"})
    back = load_activations(tmp_path / "old")
    assert back.input_dims == {}
    for name, statistics in ours.statistics.items():
        one = back.statistics[name]
        assert torch.equal(one.mean_abs, statistics.mean_abs)
        assert (one.mean, one.max_abs, one.max_at, one.after_first) == (None, None, None, None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_file_with_impossible_numbers_is_refused(
    value: float, tmp_path: Path, ours_of: Callable[[str], Activations]
) -> None:
    ours = ours_of("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    bad = ours.statistics[name].mean_abs.clone()
    bad[3] = value
    changed = replace(ours.statistics[name], mean_abs=bad)
    replace(ours, statistics={**ours.statistics, name: changed}).save(tmp_path / "a")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj.*finite"):
        load_activations(tmp_path / "a")


def test_a_selection_names_every_stored_tensor_once(base_of: Callable[[str], Path]) -> None:
    for architecture in ARCHITECTURES:
        base = open_folder(base_of(architecture))
        selection: Selection = select_targets(base)
        assert set(selection.targets) == set(selection.input_dims)
        assert sorted([*selection.targets, *selection.skipped]) == sorted(base.weights.tensors)


def test_sums_of_a_gpu_are_the_cpus():
    """The GPU's own way of adding, which runs on a CPU too, against the CPU's; the place of the first of equal peaks too."""
    generator = torch.Generator().manual_seed(0)
    for first, blocks, rows in ((1, 3, 40), (2, 2, 7), (0, 1, 33), (5, 1, 5)):
        x = torch.randn(blocks, rows, 64, generator=generator).bfloat16()
        x[:, :1] *= 50
        x[-1, rows // 2, :8] = x.abs().amax(dim=(0, 1))[:8]  # again, later, and with another sign
        x[-1, rows // 2, :4] *= -1
        expected, found = Sums(64), Sums(64)
        for part in (x, 2 * x):
            expected.add(part, first)
            before = found.numbers.clone()
            add_on_gpu(part, first, before)
            found.numbers = before
        torch.testing.assert_close(found.numbers, expected.numbers, rtol=1e-5, atol=1e-4)
