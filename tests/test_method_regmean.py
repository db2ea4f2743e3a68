"""`regmean`: the change that answers each model's own inputs most like that model, against plain float64; and the pass that takes them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import merge
from checkpoints.errors import ArgumentError, InputError
from checkpoints.placements import Placement
from forward.parts import Use
from merging import moments as moments_module
from merging.methods.regmean import InputMoments, RegMean
from merging.moments import Moments
from merging.recipe_file import read_recipe_file
from tests.aim_runs import encoder, load, make_family, write_texts
from tests.golden_files import assert_same_bits
from tests.in_memory import InMemory, make_method, patch_grid
from tests.pico import Family
from tests.reference import aim as reference
from tests.reference.of_method import Reference, by_steps

TEXTS = (
    ["the merge of channels", "weights and norms of the 42 merges that were made to the norm", "activation é " * 9],
    ["42 norm of weights of a merge", "channel to channel, weights to weights " * 6, "é", "of the activation of 42"],
)
"""Of two models' own tasks; documents of different lengths."""
SETTINGS = {"lambda_": 0.9, "ridge": 0.01, "first_token_weight": 0.05, "gram_scale": 0.9, "rest_lambda": 0.6}
FLAGS = [
    "--lambda",
    "0.9",
    "--ridge",
    "0.01",
    "--first_token_weight",
    "0.05",
    "--gram_scale",
    "0.9",
    "--rest_lambda",
    "0.6",
]


def rest(base: Tensor, models: list[Tensor], *, rest_lambda: float, **unused: object) -> Tensor:
    """What has no moments: b + rest_lambda * sum d_i."""
    return base.double() + rest_lambda * sum(model.float() - base.float() for model in models).double()  # type: ignore[union-attr]


REFERENCES = {"regmean": Reference(rest, by_steps(8), arguments=SETTINGS, single=None)}


def regmean(
    base: Tensor, models: list[Tensor], grams: list[Tensor], *, lambda_: float = 1.0, ridge: float = 0.0
) -> Tensor:
    """b + lambda D, D (sum G_i + r m I) = sum d_i G_i + r m mean d; `[out, in]`, float64; grams as they are weighted already."""
    b, deltas = base.double(), [model.double() - base.double() for model in models]
    total = sum(grams)
    assert isinstance(total, Tensor)
    pull = ridge * total.diagonal().mean()
    right = sum(d @ g for d, g in zip(deltas, grams, strict=True)) + pull * sum(deltas) / len(deltas)
    left = total + pull * torch.eye(len(total), dtype=torch.float64)
    return b + lambda_ * torch.linalg.solve(left, right, left=False)  # type: ignore[arg-type]


def weighted(rest_gram: Tensor, first: Tensor, first_token_weight: float, gram_scale: float) -> Tensor:
    """G of one model."""
    gram = rest_gram + first_token_weight * first
    return gram_scale * gram + (1 - gram_scale) * torch.diag(gram.diagonal())


def as_moments(grams: list[Tensor]) -> list[InputMoments]:
    return [InputMoments(gram.double(), torch.zeros_like(gram).double()) for gram in grams]


def random_grams(models: int, width: int, *, tokens: int = 60, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(tokens, width, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 5, width) for _ in range(models)]  # fmt: skip
    return [x.T @ x / tokens for x in inputs]


# --------------------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize(("scale", "expected"), [(1.0, [1.25, 1.75]), (0.9, [1.288962, 1.727987]), (0.0, [1.6, 1.6])])
def test_by_hand(scale: float, expected: list[float]) -> None:
    # d = [2, 0] and [0, 2]; G_1 = [[4, 1], [1, 1]], G_2 = diag(1, 4). Whole: (2, 0) G_1 + (0, 2) G_2 = (8, 10),
    # times the inverse of [[5, 1], [1, 5]], which is [[5, -1], [-1, 5]] / 24: (40 - 10, -8 + 50) / 24 = (1.25, 1.75)
    # of the diagonals alone: 8 / 5 and 8 / 5; with 0.9 the off-diagonal element is 0.9
    base = torch.zeros(1, 2)
    models = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])]
    grams = [torch.tensor([[4.0, 1.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 4.0]])]
    method = make_method("regmean", 2, ridge=0.0, gram_scale=scale)
    assert isinstance(method, RegMean)
    merged = InMemory(base, models).merge(method.with_moments(as_moments(grams), 1, "w"))  # type: ignore[arg-type]
    torch.testing.assert_close(merged, torch.tensor([expected]), rtol=0, atol=1e-6)


def test_diagonal_moments_by_hand_and_as_the_whole_ones_without_off_diagonals() -> None:
    # squares 4, 1 and 1, 4: 2 * 4/5 and 2 * 4/5; a channel that is 0 in both gets the mean
    base = torch.zeros(1, 3)
    models = [torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 2.0]])]
    squares = torch.tensor([[4.0, 1.0, 0.0], [1.0, 4.0, 0.0]], dtype=torch.float64)
    method = make_method("regmean", 2, ridge=0.0, moments="diagonal")
    assert isinstance(method, RegMean)
    ready = method.with_moments([InputMoments(one, torch.zeros(3)) for one in squares], 1, "w")
    torch.testing.assert_close(InMemory(base, models).merge(ready), torch.tensor([[1.6, 1.6, 1.5]]))  # type: ignore[arg-type]
    for shape, dim in (((9, 5), 1), ((5, 9), 0), ((3, 9, 5), 2), ((3, 5, 9), 1)):
        base, *models = torch.randn(3, *shape, generator=torch.Generator().manual_seed(3))
        experts = shape[0] if len(shape) == 3 else 1
        grams = [torch.stack([random_grams(2, 5, seed=e)[model] for e in range(experts)]) for model in range(2)]
        whole = as_moments(grams if experts > 1 else [one[0] for one in grams])
        merged = []
        for settings in ({"moments": "diagonal"}, {"gram_scale": 0.0}):
            method = make_method("regmean", 2, ridge=0.1, **settings)
            assert isinstance(method, RegMean)
            moments = [one.diagonal(experts > 1) for one in whole] if "moments" in settings else whole
            ready = method.with_moments(moments, dim, "w")
            merged += [InMemory(base, models).merge(ready, elements) for elements in (7, 1 << 17)]  # type: ignore[arg-type]
        assert_same_bits(merged[0], merged[1])
        for other in merged[2:]:
            torch.testing.assert_close(other, merged[0], rtol=1e-6, atol=1e-6)
    with pytest.raises(ArgumentError, match="gram_scale: moments diagonal has no moments between different channels"):
        make_method("regmean", 2, moments="diagonal", gram_scale=0.5)


@pytest.mark.parametrize("moments", ["full", "diagonal"])
def test_the_base_pulls_where_its_own_inputs_are(moments: str) -> None:
    base, *models = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(2))
    *grams, own = random_grams(3, 6)
    if moments == "diagonal":
        grams, own = [torch.diag(one.diagonal()) for one in grams], torch.diag(own.diagonal())
    for weight in (0.5, 1e9):
        method = make_method("regmean", 2, ridge=0.0, base_weight=weight, moments=moments)
        assert isinstance(method, RegMean)
        *known, pull = (one.diagonal(False) if moments == "diagonal" else one for one in as_moments([*grams, own]))
        merged = InMemory(base, models).merge(method.with_moments(known, 1, "w", pull))  # type: ignore[arg-type]
        right = sum((model - base).double() @ gram for model, gram in zip(models, grams, strict=True))
        expected = base.double() + torch.linalg.solve(sum(grams) + weight * own, right, left=False)  # type: ignore[arg-type]
        torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged, base, rtol=0, atol=1e-5)


def test_lambda_1_and_no_ridge_is_regmean_on_the_weights() -> None:
    """W = (sum W_i G_i) (sum G_i)^-1, which knows no base."""
    base, *models = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(1))
    grams = random_grams(3, 5)
    method = make_method("regmean", 3, ridge=0.0)
    assert isinstance(method, RegMean)
    merged = InMemory(base, models).merge(method.with_moments(as_moments(grams), 1, "w"))  # type: ignore[arg-type]
    sums = sum(w.double() @ g for w, g in zip(models, grams, strict=True))
    plain = sums @ torch.linalg.inv(sum(grams))  # type: ignore[operator, arg-type]
    torch.testing.assert_close(merged.double(), plain, rtol=1e-5, atol=1e-5)


def test_a_ridge_pulls_to_the_mean_and_first_tokens_count_by_their_weight() -> None:
    base, *models = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(2))
    first, second = random_grams(2, 6), random_grams(2, 6, seed=9)
    moments = [InputMoments(one, other) for one, other in zip(first, second, strict=True)]
    for arguments in ({"ridge": 1e9}, {"ridge": 0.1, "first_token_weight": 3.0, "lambda_": 0.5}):
        method = make_method("regmean", 2, **arguments)
        assert isinstance(method, RegMean)
        merged = InMemory(base, models).merge(method.with_moments(moments, 1, "w"))  # type: ignore[arg-type]
        grams = [one + method.first_token_weight * other for one, other in zip(first, second, strict=True)]
        expected = regmean(base, models, grams, lambda_=method.lambda_, ridge=method.ridge)
        torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=1e-5)
        if method.ridge == 1e9:
            torch.testing.assert_close(merged, (models[0] + models[1]) / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "dim"), [((9, 5), 1), ((5, 9), 0), ((3, 9, 5), 2), ((3, 5, 9), 1)])
@pytest.mark.parametrize("grid", [1 << 17, 20, 4])
def test_layouts_stacks_and_blocks(
    shape: tuple[int, ...], dim: int, grid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_grid(monkeypatch, grid)
    base, *models = torch.randn(3, *shape, generator=torch.Generator().manual_seed(3))
    experts = shape[0] if len(shape) == 3 else 1
    grams = [random_grams(2, 5, seed=expert) for expert in range(experts)]
    if experts > 1:
        grams[1] = [torch.zeros(5, 5, dtype=torch.float64)] * 2  # which no text used
    each = [torch.stack([one[model] for one in grams]) for model in range(2)]
    method = make_method("regmean", 2, ridge=0.01)
    assert isinstance(method, RegMean)
    ready = method.with_moments(as_moments(each if experts > 1 else [one[0] for one in each]), dim, "w")
    merged = [InMemory(base, models).merge(ready, elements) for elements in (1, 7, 1 << 17)]  # type: ignore[arg-type]
    for other in merged[1:]:
        assert_same_bits(other, merged[0])
    turned = (lambda x: x) if dim == len(shape) - 1 else (lambda x: x.mT)
    matrices = [turned(one).reshape(experts, 9, 5) for one in (base, *models, merged[0])]
    for expert in range(experts):
        b, *m, got = (one[expert] for one in matrices)
        idle = experts > 1 and expert == 1
        expected = b + sum(x - b for x in m) / 2 if idle else regmean(b, m, grams[expert], ridge=0.01)
        torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_task_vectors_that_are_the_same_stay_and_moments_that_are_no_numbers_are_told() -> None:
    """Whatever the inputs: each model's own answer is answered exactly."""
    base, model = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(2))
    flat = random_grams(2, 6, tokens=2)
    for ridge in (1e-4, 10.0):
        method = make_method("regmean", 2, ridge=ridge)
        assert isinstance(method, RegMean)
        merged = InMemory(base, [model, model]).merge(method.with_moments(as_moments(flat), 1, "w"))  # type: ignore[arg-type]
        torch.testing.assert_close(merged, model, rtol=1e-6, atol=1e-6)
    with pytest.raises(InputError, match="w: the second moments of its input hold NaN"):
        method.with_moments(as_moments([flat[0] * float("nan"), flat[1]]), 1, "w")


@pytest.mark.parametrize("tokens", [1, 2])
def test_singular_moments_are_told_whatever_their_roundings_leave(tokens: int) -> None:
    """In about one of twenty draws the last channels are not 0 but a rounding, which one depends on the processor."""
    method, enough = make_method("regmean", 2, ridge=0.0), make_method("regmean", 2, ridge=1e-9)
    assert isinstance(method, RegMean)
    assert isinstance(enough, RegMean)
    base, *models = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(2))
    for seed in range(100):
        flat = as_moments(random_grams(2, 6, tokens=tokens, seed=seed))
        with pytest.raises(
            InputError,
            match=r"w: the second moments .* the text is too short for 6 channels\. Give more text, or a ridge above 0",
        ):
            InMemory(base, models).merge(method.with_moments(flat, 1, "w"))  # type: ignore[arg-type]
        InMemory(base, models).merge(enough.with_moments(flat, 1, "w"))  # type: ignore[arg-type]


@pytest.mark.parametrize("dim", [1, 2])
def test_an_expert_that_no_text_used_gets_the_mean_whatever_the_base_sees(dim: int) -> None:
    base, *models = torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(4))
    used, own = random_grams(2, 5), random_grams(2, 5, seed=7)
    each = [torch.stack([one, torch.zeros(5, 5, dtype=torch.float64)]) for one in used]
    method = make_method("regmean", 2, base_weight=3.0)
    assert isinstance(method, RegMean)
    known = as_moments([*each, torch.stack(own)])
    merged = InMemory(base, models).merge(method.with_moments(known[:2], dim, "w", known[2]))  # type: ignore[arg-type]
    torch.testing.assert_close(merged[1], (models[0][1] + models[1][1]) / 2, rtol=1e-6, atol=1e-6)
    assert (merged[0] - (models[0][0] + models[1][0]) / 2).abs().max() > 0.1


# ----------------------------------------------------------------------------------------------------------- the inputs


def test_moments_by_hand() -> None:
    # tokens (1, 2), (3, 0), (0, 1) of one document: the first apart; the others [[9, 0], [0, 0]] + [[0, 0], [0, 1]], mean of two
    moments = Moments()
    moments.block = (1, 3)
    x = torch.tensor([[[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]]])
    use = Use("w", 1, ((0, 4), (0, 2)))
    moments.see(use, x)
    placement = Placement("w", "linear", 1, axes=(0, 1))
    found = moments.of(placement, (4, 2))
    assert torch.equal(found.rest, torch.tensor([[4.5, 0.0], [0.0, 0.5]], dtype=torch.float64))  # type: ignore[union-attr]
    assert torch.equal(found.first, torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64))  # type: ignore[union-attr]
    moments.is_open = False
    moments.see(use, x * 7)
    assert moments.of(placement, (4, 2)) is found
    moments.clear()
    assert moments.of(placement, (4, 2)) is None
    moments.is_open = True
    moments.see(use, x[0, :2])  # two rows of three tokens: a router's, of which no one knows the first
    found = moments.of(placement, (4, 2))
    assert torch.equal(found.rest, torch.tensor([[5.0, 1.0], [1.0, 2.0]], dtype=torch.float64))  # type: ignore[union-attr]
    assert not found.first.any()  # type: ignore[union-attr]
    moments.see(use, x[0, :2].clone())  # more of it, after it was asked for
    assert torch.equal(moments.of(placement, (4, 2)).rest, found.rest)  # type: ignore[union-attr]


def test_an_input_that_weights_share_is_multiplied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for at_once in (4096, 5):
        monkeypatch.setattr(moments_module, "ROWS_AT_ONCE", at_once)
        moments = Moments()
        moments.block = (1, 3)
        documents = torch.randn(4, 1, 3, 6, generator=torch.Generator().manual_seed(0))
        for x in documents:
            for name in ("q", "k"):
                moments.see(Use(name, 1, ((0, 4), (0, 6))), x)
            moments.see(Use("o", 1, ((0, 4), (0, 6))), x + 1)
        moments.of(Placement("o", "linear", 1, axes=(0, 1)), (4, 6))
        q, k = (moments.of(Placement(name, "linear", 1, axes=(0, 1)), (4, 6)) for name in ("q", "k"))
        assert (q is k) == (at_once == 4096)
        rows = documents[:, 0, 1:].reshape(-1, 6).double()
        for one in (q, k):
            torch.testing.assert_close(one.rest, rows.T @ rows / 8)  # type: ignore[union-attr]
        x = documents[0]
        moments.see(Use("q", 1, ((0, 4), (0, 6))), x)
        x += 1.0  # changed in place between two weights
        moments.see(Use("k", 1, ((0, 4), (0, 6))), x)
        q, k = (moments.of(Placement(name, "linear", 1, axes=(0, 1)), (4, 6)) for name in ("q", "k"))
        assert not torch.equal(q.rest, k.rest)  # type: ignore[union-attr]


@dataclass(frozen=True)
class Scene:
    """A family of two models with a file of text for each."""

    family: Family
    files: list[Path]

    def command(self, out: Path, *flags: object) -> list[str]:
        models, files = (",".join(map(str, some)) for some in (self.family.models, self.files))
        command = ["--method", "regmean", "--base_model", self.family.base, "--models_to_merge", models]
        command += ["--model_data", files, "--save_path", out, "--dtype", "float32", "--quiet", *flags]
        return [str(part) for part in command]


@pytest.fixture(scope="module")
def scene_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Scene]:
    def make(architecture: str) -> Scene:
        folder = tmp_path_factory.mktemp(architecture)
        family = make_family(folder, architecture, n_models=2)
        files = []
        for number, texts in enumerate(TEXTS):
            path = folder / f"{number}.jsonl"
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            files.append(path)
        return Scene(family, files)

    return cache(make)


def grams_of(
    folder: Path, texts: list[str], name: str, expert: int | None, inputs: Any, weight: float = 0.05, scale: float = 0.9
) -> Tensor | None:
    """G of one model's weight, from what the reference saw of it on its own documents."""
    seen = inputs[folder][name]
    rows = seen.rows.get(expert)
    if rows is None:
        return None
    lengths = [len(encoder().encode(text.strip()).ids) for text in texts]
    in_order = "experts" not in name  # a router's rows do not tell which of them are first tokens
    firsts = torch.cat([one[:1] for one in rows]) if in_order else torch.zeros(0, rows[0].shape[-1]).double()
    others = torch.cat([one[1:] if in_order else one for one in rows])
    assert not in_order or [len(one) for one in rows] == lengths
    first = firsts.T @ firsts / max(1, len(firsts))
    return weighted(others.T @ others / max(1, len(others)), first, weight if in_order else 0.0, scale)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "mixtral", "gpt_oss"])
def test_a_merge_is_the_formula_with_each_models_own_inputs(
    architecture: str, scene_of: Callable[[str], Scene], tmp_path: Path
) -> None:
    scene = scene_of(architecture)
    assert merge.main(scene.command(tmp_path / "out", *FLAGS)) == 0
    base, *models = (load(folder) for folder in (scene.family.base, *scene.family.models))
    merged = load(tmp_path / "out")
    inputs = {
        folder: reference.watch_inputs(folder, [torch.tensor(encoder().encode(text.strip()).ids) for text in texts])  # type: ignore[arg-type]
        for folder, texts in zip(scene.family.models, TEXTS, strict=True)
    }
    matrices = 0
    for name, b in base.items():
        own = [model[name] for model in models]
        seen = inputs[scene.family.models[0]].get(name)
        layer = re.search(r"\.(layers|h|block_sparse_moe|mlp)\.", name)
        if b.dim() < 2 or seen is None or layer is None or "lm_head" in name:
            torch.testing.assert_close(merged[name].double(), rest(b, own, rest_lambda=0.6), rtol=1e-5, atol=1e-6)
            continue
        dim = seen.input_dim
        for expert in [None] if None in seen.rows else range(len(b)) if b.dim() == 3 else [0]:
            key = None if None in seen.rows else expert
            grams = [grams_of(folder, list(texts), name, key, inputs) for folder, texts in zip(scene.family.models, TEXTS, strict=True)]  # fmt: skip
            parts = [one if b.dim() == 2 else one[expert] for one in (b, *own, merged[name])]
            parts = parts if dim == b.dim() - 1 else [one.mT for one in parts]
            start, *ends, got = (one.double() for one in parts)
            width = start.shape[1]
            known = [torch.zeros(width, width, dtype=torch.float64) if one is None else one for one in grams]
            if all(one is None for one in grams):
                expected = start + 0.9 * sum(end - start for end in ends) / 2
            else:
                expected = regmean(start, ends, known, lambda_=0.9, ridge=0.01)
            slack = 2e-3 * (expected - start).abs().max() + 1e-6
            assert float((got - expected).abs().max()) <= slack, (name, expert)
            assert float((got - rest(start, ends, rest_lambda=0.6)).abs().max()) > 10 * slack, (name, expert)
            matrices += 1
    assert matrices >= 8


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_oss"])
def test_diagonal_moments_are_the_diagonal(architecture: str, scene_of: Callable[[str], Scene], tmp_path: Path) -> None:
    scene = scene_of(architecture)
    assert merge.main(scene.command(tmp_path / "diagonal", "--moments", "diagonal")) == 0
    assert merge.main(scene.command(tmp_path / "whole", "--gram_scale", "0")) == 0
    one, other = load(tmp_path / "diagonal"), load(tmp_path / "whole")
    for name, values in one.items():
        torch.testing.assert_close(values, other[name], rtol=1e-5, atol=1e-6)
    recorded = json.loads((tmp_path / "diagonal" / "merge_recipe.json").read_text())
    assert recorded["parameters"]["moments"] == "diagonal"
    again = read_recipe_file(tmp_path / "diagonal" / "merge_recipe.json")
    method = again.method("model.layers.0.mlp.up_proj.weight")
    assert isinstance(method, RegMean)
    assert method.moments == "diagonal"


def test_the_base_runs_on_all_texts_where_it_has_a_weight(scene_of: Callable[[str], Scene], tmp_path: Path) -> None:
    scene = scene_of("llama")
    assert merge.main(scene.command(tmp_path / "out", "--base_weight", "0.5", "--ridge", "0.01")) == 0
    notes = json.loads((tmp_path / "out" / "merge_recipe.json").read_text())["notes"]
    counts = [
        int(re.search(r"of all tasks, (\d+) tokens|of its own task, (\d+) tokens", note)[0].split()[-2])
        for note in notes[:3]
    ]  # type: ignore[index]
    assert "base: runs on 7 documents of all tasks" in notes[2]
    assert counts[2] == counts[0] + counts[1]
    folders = [scene.family.base, *scene.family.models]
    start, *ends = (load(folder) for folder in folders)
    every = [*TEXTS[0], *TEXTS[1]]
    seen = {
        folder: reference.watch_inputs(folder, [torch.tensor(encoder().encode(text.strip()).ids) for text in texts])  # type: ignore[arg-type]
        for folder, texts in zip(folders, (every, *TEXTS), strict=True)
    }
    merged = load(tmp_path / "out")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.o_proj.weight"):
        pull, *grams = (grams_of(folder, list(texts), name, None, seen, 0.01, 1.0) for folder, texts in zip(folders, (every, *TEXTS), strict=True))  # fmt: skip
        total = sum(grams)  # type: ignore[arg-type]
        ridge = 0.01 * total.diagonal().mean()  # type: ignore[union-attr]
        deltas = [(end[name] - start[name]).double() for end in ends]
        right = sum(d @ g for d, g in zip(deltas, grams, strict=True)) + ridge * sum(deltas) / 2  # type: ignore[operator]
        left = total + 0.5 * pull + ridge * torch.eye(len(total), dtype=torch.float64)  # type: ignore[operator, arg-type]
        expected = torch.linalg.solve(left, right, left=False)
        found = merged[name].double() - start[name].double()
        assert float((found - expected).abs().max()) <= 2e-3 * float(expected.abs().max()) + 1e-6


def test_each_model_reads_its_own_text_and_the_order_counts(scene_of: Callable[[str], Scene], tmp_path: Path) -> None:
    scene = scene_of("llama")
    assert merge.main(scene.command(tmp_path / "own")) == 0
    swapped = Scene(scene.family, scene.files[::-1])
    assert merge.main(swapped.command(tmp_path / "swapped")) == 0
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(load(tmp_path / "own")[name], load(tmp_path / "swapped")[name])
    norm = "model.layers.0.input_layernorm.weight"
    assert_same_bits(load(tmp_path / "own")[norm], load(tmp_path / "swapped")[norm])


def test_bytes_do_not_depend_on_workers_or_shards(scene_of: Callable[[str], Scene], tmp_path: Path) -> None:
    scene = scene_of("gpt2")
    assert merge.main(scene.command(tmp_path / "one", "--workers", "1")) == 0
    assert merge.main(scene.command(tmp_path / "three", "--workers", "3", "--max_shard_size", "20kB")) == 0
    from transformers import AutoModelForCausalLM

    one, three = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "three"))
    assert all(torch.equal(one[name], three[name]) for name in one)


def test_prompt_and_answer_go_through_the_chat_template(scene_of: Callable[[str], Scene], tmp_path: Path) -> None:
    scene = scene_of("llama")
    row = {"prompt": "what is a norm?", "answer": "a channel"}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "<u>what is a norm?</u>a channel"}) + "\n")
    template = "<s>{% for m in messages %}{% if m['role'] == 'user' %}<u>{{ m['content'] }}</u>{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    from shutil import copytree

    folders = []
    for folder in scene.family.models:
        copytree(folder, tmp_path / folder.name)
        folders.append(tmp_path / folder.name)
    base = tmp_path / "base"
    copytree(scene.family.base, base)
    chat, text = (Scene(Family(base, folders), [tmp_path / f"{name}.jsonl"] * 2) for name in ("chat", "text"))  # type: ignore[call-arg]
    assert merge.main(chat.command(tmp_path / "refused")) == 1
    for folder in folders:
        (folder / "chat_template.jinja").write_text(template)
    assert merge.main(chat.command(tmp_path / "by_chat", "--chat_template", template)) == 0
    assert merge.main(text.command(tmp_path / "by_text", "--chat_template", template)) == 0
    one, other = load(tmp_path / "by_chat"), load(tmp_path / "by_text")
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------------------------------------- recipe, messages


def test_a_recipe_has_data_beside_each_model(scene_of: Callable[[str], Scene], tmp_path: Path) -> None:
    scene = scene_of("llama")
    assert merge.main(scene.command(tmp_path / "out", "--ridge", "0.01")) == 0
    recorded = json.loads((tmp_path / "out" / "merge_recipe.json").read_text())
    assert [one["data"] for one in recorded["models"]] == [str(path) for path in scene.files]
    assert any("3 documents of its own task" in note for note in recorded["notes"])
    written = scene.command(tmp_path / "unused", "--ridge", "0.01", "--write_config", tmp_path / "recipe.yml")
    assert merge.main(written) == 0
    for file in (tmp_path / "recipe.yml", tmp_path / "out" / "merge_recipe.json"):
        again = read_recipe_file(file)
        assert [source.data for source in again.models] == [str(path) for path in scene.files]
    assert (
        merge.main(["--config", str(tmp_path / "recipe.yml"), "--save_path", str(tmp_path / "again"), "--quiet"]) == 0
    )
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def refusal(scene: Scene, out: Path, capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    capsys.readouterr()
    assert merge.main(scene.command(out, *flags)) in (1, 2)
    assert not out.exists()
    return capsys.readouterr().err


def test_what_is_refused(scene_of: Callable[[str], Scene], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene, out = scene_of("llama"), tmp_path / "out"
    say = lambda files, *flags: refusal(Scene(scene.family, files), out, capsys, *flags)  # noqa: E731
    assert "--model_data: expected a file for each of the 2 models, in their order, got 1" in say(scene.files[:1])
    missing = tmp_path / "none.jsonl"
    assert f"--model_data {missing}: no such file. Give a file of texts of {scene.family.models[1]}'s own task." in say([scene.files[0], missing])  # fmt: skip
    for content, says in (
        ('{"question": "?"}\n', "row 1: expected a text, or the fields text, or prompt and answer, got question. Mend the row."),
        ("7\n", "row 1: expected a text, or the fields text, or prompt and answer, got int. Mend the row."),
        ('{"text": " "}\n', "own task, got none. Give another file."),
        ('{"prompt": "a", "answer": "b"}\n', "expected a chat template, which rows of prompt and answer need, got none."),
    ):  # fmt: skip
        missing.write_text(content)
        assert says in say([scene.files[0], missing])
    assert "--moments: expected full or diagonal, got some." in say(scene.files, "--moments", "some")
    few = tmp_path / "few.txt"
    few.write_text("norm\n")
    said = say([few, few], "--ridge", "0")
    assert re.search(r"--ridge 0: \S+: the second moments of \d+ tokens have a rank below its \d+ input channels\. Give more text \(--data_tokens\), or a --ridge above 0\.", said)  # fmt: skip
    flags = [
        "--base_model",
        scene.family.base,
        "--models_to_merge",
        ",".join(map(str, scene.family.models)),
        "--save_path",
        out,
    ]
    for more, says in (
        (["--method", "regmean"], "--model_data: regmean needs text of each model's own task, one file for each."),
        (["--method", "ties", "--model_data", "a,b"], "--model_data: ties does not use it. Leave it out."),
    ):
        assert merge.main([str(part) for part in (*flags, *more)]) == 2
        assert says in capsys.readouterr().err


def test_nan_in_the_inputs_names_the_weight(
    scene_of: Callable[[str], Scene], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from shutil import copytree

    from safetensors.torch import save_file

    scene = scene_of("llama")
    copytree(scene.family.models[0], tmp_path / "loud")
    tensors = load(tmp_path / "loud")
    norm = "model.layers.0.input_layernorm.weight"
    tensors[norm] = torch.full_like(tensors[norm].float(), 3e38)  # what it makes of inputs overflows
    save_file(
        {name: one.float() for name, one in tensors.items()}, tmp_path / "loud/model.safetensors", {"format": "pt"}
    )
    loud = Scene(Family(scene.family.base, [tmp_path / "loud", scene.family.models[1]]), scene.files)  # type: ignore[call-arg]
    said = refusal(loud, tmp_path / "out", capsys)
    assert re.search(
        r"model\.layers\.0\.\S+_proj\.weight: the second moments of its input hold NaN or an infinity", said
    )


def test_with_aim_in_one_run(scene_of: Callable[[str], Scene], tmp_path: Path) -> None:
    scene = scene_of("llama")
    calibration = [
        "--calibration_data",
        write_texts(tmp_path),
        "--block_size",
        "96",
        "--omega",
        "0",
        "--protect",
        "mean",
    ]
    assert merge.main(scene.command(tmp_path / "out", *calibration)) == 0
    assert merge.main(scene.command(tmp_path / "plain")) == 0
    recorded = json.loads((tmp_path / "out" / "merge_recipe.json").read_text())
    assert recorded["aim"]["protect"] == "mean"
    assert not torch.equal(*(load(tmp_path / name)["model.layers.0.mlp.up_proj.weight"] for name in ("out", "plain")))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_oss"])
def test_with_inputs_merged_a_layer_looks_at_what_the_merged_ones_before_it_give(
    architecture: str, scene_of: Callable[[str], Scene], tmp_path: Path
) -> None:
    """Each layer against the formula, with the inputs of models that are the merge but for this one layer, which is a model's own."""
    scene = scene_of(architecture)
    assert merge.main(scene.command(tmp_path / "out", *FLAGS, "--inputs", "merged")) == 0
    base, *models = (load(folder) for folder in (scene.family.base, *scene.family.models))
    merged = load(tmp_path / "out")
    matrices = 0
    for layer in range(2):
        hybrids = []
        for number, model in enumerate(models):
            folder = tmp_path / f"{layer}-{number}"
            shutil.copytree(scene.family.base, folder)
            for old in folder.glob("*.safetensors*"):
                old.unlink()
            own = {name: (model if re.search(rf"\.(layers|h)\.{layer}\.", name) else merged)[name] for name in merged}
            save_file({name: tensor.float().contiguous() for name, tensor in own.items()}, folder / "model.safetensors", {"format": "pt"})  # fmt: skip
            hybrids.append(folder)
        inputs = {
            folder: reference.watch_inputs(folder, [torch.tensor(encoder().encode(text.strip()).ids) for text in texts])  # type: ignore[arg-type]
            for folder, texts in zip(hybrids, TEXTS, strict=True)
        }
        for name, b in base.items():
            seen = inputs[hybrids[0]].get(name)
            if b.dim() != 2 or seen is None or not re.search(rf"\.(layers|h)\.{layer}\.", name):
                continue
            grams = [grams_of(folder, list(texts), name, None, inputs) for folder, texts in zip(hybrids, TEXTS, strict=True)]  # fmt: skip
            if any(gram is None for gram in grams):
                continue
            parts = [one if seen.input_dim == 1 else one.T for one in (b, *(model[name] for model in models), merged[name])]  # fmt: skip
            expected = regmean(parts[0], parts[1:-1], grams, lambda_=0.9, ridge=0.01)  # type: ignore[arg-type]
            torch.testing.assert_close(parts[-1].double(), expected, rtol=1e-4, atol=1e-5)
            matrices += 1
    assert matrices >= 8
    own = scene.command(tmp_path / "own", *FLAGS)
    assert merge.main(own) == 0
    first, last = (next(name for name in merged if re.search(rf"\.(layers|h)\.{at}\..*(q_proj|c_attn)\.weight", name)) for at in (0, 1))  # fmt: skip
    other = load(tmp_path / "own")
    assert not torch.equal(other[last], merged[last])
    if architecture == "llama":  # the first layer's inputs come from the embedding, which is merged too
        assert not torch.equal(other[first], merged[first])


def test_a_tokenizer_with_other_tokens_is_refused(
    scene_of: Callable[[str], Scene], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = scene_of("llama")
    other = tmp_path / "other"
    shutil.copytree(scene.family.models[1], other)
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.__getitem__)
    used = next(token for token in vocabulary if token in TEXTS[1][0])
    vocabulary[used], vocabulary[last] = vocabulary[last], vocabulary[used]
    file.write_text(json.dumps(content))
    command = scene.command(tmp_path / "out")
    command[command.index("--models_to_merge") + 1] = f"{scene.family.models[0]},{other}"
    assert merge.main(command) == 1
    message = capsys.readouterr().err
    assert f"{other}: expected the tokenizer of {scene.family.base}, got another: token " in message
    assert "Merge models of one tokenizer, or use another method." in message


def test_inputs_merged_and_a_base_weight_exclude_each_other(
    scene_of: Callable[[str], Scene], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge.main(scene_of("llama").command(tmp_path / "out", "--inputs", "merged", "--base_weight", "0.1")) == 2
    assert "--inputs merged: --base_weight takes the base's own inputs" in capsys.readouterr().err
