"""Whole merges: files in, files out, compared with tests/reference; the same bytes however the work is shared."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import blake3
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignment.layout import Layout
from checkpoints import provenance, writer
from checkpoints.errors import InputError, Refusals
from checkpoints.reader import Checkpoint
from merging import RunOptions, make_recipe, merge
from merging.methods import METHODS, get_method
from streaming import stream
from streaming.blocks import BLOCK_ELEMENTS, Region, TensorSpec
from streaming.stream import StreamOptions
from tests import golden_files
from tests.golden_files import assert_same_bits, load_tensors
from tests.in_memory import (
    WITHOUT_DATA,
    assert_rounds_to,
    expect,
    fitting,
    fitting_arguments,
    flipped,
    keys_of,
    make_method,
    patch_grid,
    random_inputs,
    required,
)
from tests.pico import MERGE_ARCHITECTURES, Family, make_family, write_checkpoint
from tests.reference.of_method import find

INPUTS = golden_files.GOLDENS / "inputs"
REFERENCES = {name: find(name) for name in METHODS}
ARGUMENTS: dict[str, dict[str, Any]] = {name: dict(reference.arguments) for name, reference in REFERENCES.items()}
"""Arguments that tell every model from every other."""
UNEQUAL = ARGUMENTS["ties"]


def run(
    out: Path,
    method: str,
    base: Path,
    models: Sequence[Path],
    arguments: Mapping[str, Any] | None = None,
    *,
    workers: int | None = 2,
    block_elements: int | None = None,
    out_dtype: str = "auto",
    exclude: str | None = None,
    seed: int | None = None,
    device: str = "cpu",
    layout: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Merge folders, as many as the method merges, with the Python API; arguments are those of tests/reference."""
    keys = keys_of(get_method(method))
    models = fitting(method, models)
    parameters = {
        keys[key]: ",".join(map(repr, value)) if isinstance(value, list) else value
        for key, value in (required(method) | dict(arguments or {})).items()
    }
    recipe = make_recipe(
        method, str(base), ",".join(map(str, models)), parameters=parameters, seed=seed, out_dtype=out_dtype,
        exclude=exclude, layout=Layout(**(layout or {})),
    )  # fmt: skip
    how = StreamOptions(torch.device(device), workers=workers, block_elements=block_elements)
    return merge(recipe, out, RunOptions(stream=how, quiet=True, **options))


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors checkpoint of one file or several, read by the safetensors library."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def file_digests(folder: Path) -> dict[str, str]:
    """Every file of a checkpoint but the two that name paths, by its bytes."""
    paths = [path for path in folder.iterdir() if path.name not in ("merge_recipe.json", "README.md")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def compare(
    merged: Mapping[str, Tensor],
    method_name: str,
    base: Mapping[str, Tensor],
    models: Sequence[Mapping[str, Tensor]],
    arguments: Mapping[str, Any],
    *,
    embeddings: set[str] = frozenset(),  # type: ignore[assignment]
    seed: int = 0,
    formula: Callable[..., Tensor] | None = None,
) -> None:
    """Every tensor of a merge against the float64 reference, within one rounding. Raises AssertionError."""
    assert sorted(merged) == sorted(base)
    models = fitting(method_name, models)
    method = make_method(method_name, len(models), seed=seed, **required(method_name) | dict(arguments))
    for name, tensor in base.items():
        spec = TensorSpec(name, tuple(tensor.shape), name in embeddings)
        inputs = [model[name] for model in models]
        expected, slack, unclear = expect(method_name, method, spec, tensor, inputs, formula)
        assert_rounds_to(merged[name], expected, slack, unclear, name)


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """Pico families by architecture, each made once."""
    made: dict[str, Family] = {}

    def get(architecture: str) -> Family:
        if architecture not in made:
            made[architecture] = make_family(tmp_path_factory.mktemp(architecture), architecture)
        return made[architecture]

    return get


# ---------------------------------------------------------------------------------------- every architecture, reloaded


def load_model(folder: Path) -> Any:
    """The model as users load it; nothing may be missing, unexpected or of another shape."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model


def embedding_names(model: Any) -> set[str]:
    """The weights that an nn.Embedding holds; these models store them under their own names."""
    modules = model.named_modules()
    return {f"{name}.weight" for name, module in modules if isinstance(module, torch.nn.Embedding)}


IN_DEPTH = ("llama", "qwen3", "mixtral")
MERGES = [
    (architecture, method)
    for architecture in MERGE_ARCHITECTURES
    for method in (WITHOUT_DATA if architecture in IN_DEPTH else ("ties", "widen"))
]


@pytest.mark.command
@pytest.mark.parametrize(("architecture", "method"), MERGES)
def test_a_merge_is_the_reference_loads_and_generates(pico, tmp_path: Path, architecture: str, method: str):
    from transformers import AutoTokenizer

    family = pico(architecture)
    out = tmp_path / "out"
    result = run(
        out, method, family.base, family.models, ARGUMENTS[method], seed=5 if get_method(method).draws else None
    )
    assert result.warnings == []
    model = load_model(out)
    embeddings = embedding_names(model)
    inputs = [load_tensors(folder) for folder in (family.base, *family.models)]
    assert embeddings <= inputs[0].keys()
    merged = load_tensors(out)
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    compare(merged, method, inputs[0], inputs[1:], ARGUMENTS[method], embeddings=embeddings, seed=5)
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("merge", return_tensors="pt")
    tokens = model.generate(**prompt, min_new_tokens=4, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] == prompt["input_ids"].shape[1] + 4
    copied = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    written = {path.name for path in out.iterdir()}
    assert written == copied | {"model.safetensors", "merge_recipe.json", "README.md"}
    for name in copied:
        assert (out / name).read_bytes() == (family.base / name).read_bytes()


@pytest.mark.parametrize("method", WITHOUT_DATA)
def test_the_comparison_sees_a_wrong_reference(pico, tmp_path: Path, method: str):
    """A turned sign; models in each other's places."""
    family = pico("llama")
    run(
        tmp_path / "out",
        method,
        family.base,
        family.models,
        ARGUMENTS[method],
        seed=5 if get_method(method).draws else None,
    )
    base, *models = (load_tensors(folder) for folder in (family.base, *family.models))
    arguments = (load_tensors(tmp_path / "out"), method, base, models, ARGUMENTS[method])
    names = {"embeddings": {"model.embed_tokens.weight"}, "seed": 5}
    compare(*arguments, **names)
    with pytest.raises(AssertionError, match="not the rounded reference"):
        compare(*arguments, **names, formula=flipped(method))
    if REFERENCES[method].misplaced is not None:
        with pytest.raises(AssertionError, match="not the rounded reference"):
            compare(*arguments, **names, formula=REFERENCES[method].misplaced)


def test_the_comparison_sees_one_changed_element_another_seed_and_a_missing_tensor(pico, tmp_path: Path):
    family = pico("llama")
    run(tmp_path / "out", "dare_ties", family.base, family.models, UNEQUAL, seed=5)
    base, *models = (load_tensors(folder) for folder in (family.base, *family.models))
    merged = load_tensors(tmp_path / "out")
    with pytest.raises(AssertionError, match="not the rounded reference"):
        compare(merged, "dare_ties", base, models, UNEQUAL, seed=6)
    name = "model.layers.1.mlp.up_proj.weight"
    merged[name].view(torch.int16)[3, 4] += 1  # the next bf16 number
    with pytest.raises(AssertionError, match=rf"{name}: 1 of \d+ elements"):
        compare(merged, "dare_ties", base, models, UNEQUAL, seed=5)
    del merged[name]
    with pytest.raises(AssertionError):
        compare(merged, "dare_ties", base, models, UNEQUAL, seed=5)


@pytest.mark.command
@pytest.mark.parametrize("method", WITHOUT_DATA)
def test_a_single_model_is_itself_and_lambda_zero_is_the_base(pico, tmp_path: Path, method: str):
    single = REFERENCES[method].single
    if get_method(method).min_models > 1 or single is None:
        pytest.skip("leaves no single model as it is")
    family = pico("qwen3")
    base, model = load_tensors(family.base), load_tensors(family.models[0])
    run(tmp_path / "one", method, family.base, family.models[:1], single)
    for name, tensor in load_tensors(tmp_path / "one").items():
        lost = model[name].float().abs() < 2**-15 * base[name].float().abs()
        assert_same_bits(tensor, model[name], allow=lost, where=name)
        assert lost.sum() < 3
    if "lambda_" in ARGUMENTS[method]:
        run(tmp_path / "base", method, family.base, family.models, ARGUMENTS[method] | {"lambda_": 0.0})
        for name, tensor in load_tensors(tmp_path / "base").items():
            assert_same_bits(tensor, base[name], where=name)


@pytest.mark.parametrize("out_dtype", ["float32", "float16"])
def test_another_dtype_is_one_rounding_too(pico, tmp_path: Path, out_dtype: str):
    family = pico("llama")
    run(tmp_path / "out", "ties", family.base, family.models, UNEQUAL, out_dtype=out_dtype)
    base, *models = (load_tensors(folder) for folder in (family.base, *family.models))
    merged = load_tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in merged.values()} == {getattr(torch, out_dtype)}
    compare(merged, "ties", base, models, UNEQUAL)
    assert load_model(tmp_path / "out").dtype == getattr(torch, out_dtype)


def test_excluded_tensors_are_the_bases(pico, tmp_path: Path):
    family = pico("llama")
    run(tmp_path / "out", "linear", family.base, family.models, exclude="norm|embed")
    base, *models = (load_tensors(folder) for folder in (family.base, *family.models))
    merged = load_tensors(tmp_path / "out")
    kept = {name for name in base if "norm" in name or "embed" in name}
    assert len(kept) == 6
    for name in kept:
        assert_same_bits(merged[name], base[name])
    rest = base.keys() - kept
    compare({name: merged[name] for name in rest}, "linear", {name: base[name] for name in rest}, models, {})


# ------------------------------------------------------------------------- the same bytes, however the work is done

TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 30, "hidden_size": 16,
    "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
ODD_SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (30, 16), "a.weight": (13, 37), "experts.weight": (3, 5, 11), "vector.weight": (629,),
    "scalar.weight": (), "wide.weight": (2, 1201), "tall.weight": (301, 1), "nothing.weight": (0, 4),
    "none.weight": (0,),
}  # fmt: skip


def write_family(
    folder: Path,
    shapes: Mapping[str, Sequence[int]],
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,) * 4,
    seed: int = 0,
    config: Mapping[str, Any] = TINY,
    **layout: Any,
) -> Family:
    """Base and fine-tunes of any tensors, one dtype each. Matrices of one row are whole numbers, see widen's tests."""
    tensors: list[dict[str, Tensor]] = [{} for _ in dtypes]
    for position, (name, shape) in enumerate(shapes.items()):
        whole = len(shape) > 1 and shape[-2] == 1
        base, models = random_inputs(shape, len(dtypes) - 1, seed=seed * 1000 + position, whole=whole)
        for part, values, dtype in zip(tensors, (base, *models), dtypes, strict=True):
            part[name] = values.to(dtype)
    names = ["base", *(f"model_{i}" for i in range(len(dtypes) - 1))]
    folders = [
        write_checkpoint(folder / name, part, config, **layout) for name, part in zip(names, tensors, strict=True)
    ]
    return Family(folders[0], folders[1:])


@pytest.mark.command
@pytest.mark.parametrize("method", WITHOUT_DATA)
def test_blocks_and_workers_change_no_byte(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch):
    """With a grid of 256 elements, so that tensors have many measured blocks too."""
    patch_grid(monkeypatch, 256)
    dtypes = (torch.bfloat16, torch.bfloat16, torch.float32, torch.float16)
    family = write_family(tmp_path, ODD_SHAPES, dtypes)
    found = []
    for block_elements, workers in ((1 << 17, 1), (7, 2), (37, 1), (1000, 5), (1 << 20, 2)):
        out = tmp_path / f"{block_elements}"
        run(out, method, family.base, family.models, ARGUMENTS[method], block_elements=block_elements, workers=workers)
        found.append(file_digests(out))
    assert all(digests == found[0] for digests in found)
    base, *models = (load_tensors(folder) for folder in (family.base, *family.models))
    embeddings = {"model.embed_tokens.weight"}
    compare(load_tensors(tmp_path / "7"), method, base, models, ARGUMENTS[method], embeddings=embeddings)


@pytest.mark.command
@pytest.mark.parametrize("method", ["ties", "dare_ties", "widen"])
def test_blocks_and_workers_change_no_byte_of_large_tensors(tmp_path: Path, method: str):
    """The grid as it is: tensors of more than two blocks, many rows, long rows, no rows."""
    shapes = {
        "model.embed_tokens.weight": (30, 16), "a.weight": (300, 1000), "b.weight": (2, 150_001), "c.weight": (300_001,)
    }  # fmt: skip
    family = write_family(tmp_path, shapes, (torch.bfloat16,) * 3)
    arguments = fitting_arguments(ARGUMENTS[method], 2)
    found = []
    for block_elements, workers in ((None, 1), (1000, 5), (70_000, 2), (1 << 20, 2)):
        out = tmp_path / f"{block_elements}"
        run(out, method, family.base, family.models, arguments, block_elements=block_elements, workers=workers)
        found.append(file_digests(out))
    assert all(digests == found[0] for digests in found)
    base, *models = (load_tensors(folder) for folder in (family.base, *family.models))
    compare(load_tensors(out), method, base, models, arguments, embeddings={"model.embed_tokens.weight"})


@pytest.mark.command
@pytest.mark.parametrize("method", ["dare_ties", "widen"])
def test_shards_of_the_output_change_no_tensor(tmp_path: Path, pico, method: str):
    family = pico("llama")
    whole, total = None, 2 * 34720
    for max_shard_bytes, files in ((10**9, 1), (total, 1), (total - 1, 2), (20_000, 4), (1, 21)):
        found = []
        for workers in (1, 3):
            out = tmp_path / f"{max_shard_bytes}_{workers}"
            run(out, method, family.base, family.models, max_shard_bytes=max_shard_bytes, workers=workers)
            found.append(file_digests(out))
        assert found[0] == found[1]
        assert len(list(out.glob("*.safetensors"))) == files
        merged = read_checkpoint(out)
        whole = whole or merged
        assert merged.keys() == whole.keys()
        for name in whole:
            assert_same_bits(merged[name], whole[name], where=name)
    load_model(out)


def test_layout_of_the_inputs_changes_no_byte(tmp_path: Path):
    found = []
    for layout in ({}, {"shards": 4}, {"weights": "bin"}, {"weights": "bin", "shards": 3}):
        folder = tmp_path / str(len(found))
        family = write_family(folder, ODD_SHAPES, (torch.float16,) * 4, **layout)
        run(folder / "out", "ties", family.base, family.models, UNEQUAL)
        found.append(file_digests(folder / "out"))
    assert all(digests == found[0] for digests in found)


def test_a_transposed_pickle_is_read_as_it_looks(tmp_path: Path):
    """A pickle may hold views with strides of their own."""
    shapes = {"a.weight": (37, 50), "b.weight": (3, 4, 5), "c.weight": (20,)}
    family = write_family(tmp_path, shapes)
    run(tmp_path / "plain", "ties", family.base, family.models, UNEQUAL)
    tensors = load_tensors(family.models[1])
    storage = torch.zeros(20, 2, dtype=torch.bfloat16)
    storage[:, 0] = tensors["c.weight"]
    views = {
        "a.weight": tensors["a.weight"].T.contiguous().T,
        "b.weight": tensors["b.weight"].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "c.weight": storage[:, 0],
    }
    assert not any(view.is_contiguous() for view in views.values())
    (family.models[1] / "model.safetensors").unlink()
    torch.save(views, family.models[1] / "pytorch_model.bin")
    for block_elements in (7, 1 << 17):
        out = tmp_path / str(block_elements)
        run(out, "ties", family.base, family.models, UNEQUAL, block_elements=block_elements)
        assert file_digests(out) == file_digests(tmp_path / "plain")


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = st.lists(st.one_of(st.integers(0, 9), st.integers(0, 70)), max_size=3).map(tuple)


ANY_MERGE = given(
    method=st.sampled_from(WITHOUT_DATA),
    shapes=st.lists(SHAPES, min_size=1, max_size=4),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=2, max_size=4),
    shards=st.integers(1, 3),
    weights=st.sampled_from(["safetensors", "bin"]),
    max_shard_bytes=st.sampled_from([1, 700, 10**9]),
    block_elements=st.sampled_from([5, 64, 1 << 17]),
    seed=st.integers(0, 10**6),
)


def check_any_merge(folder, method, shapes, dtypes, shards, weights, max_shard_bytes, block_elements, seed):
    named = {f"layers.{position}.weight": shape for position, shape in enumerate(shapes)}
    family = write_family(folder, named, dtypes, seed, weights=weights, shards=shards)
    count = len(family.models)
    assume(count >= get_method(method).min_models)
    arguments = fitting_arguments(ARGUMENTS[method], count)
    options = {"max_shard_bytes": max_shard_bytes, "block_elements": block_elements}
    run(folder / "out", method, family.base, family.models, arguments, **options)
    inputs = [load_all(path, weights) for path in (family.base, *family.models)]
    merged = read_checkpoint(folder / "out")
    assert {tensor.dtype for tensor in merged.values()} == {dtypes[0]}
    compare(merged, method, inputs[0], inputs[1:], arguments)


@pytest.mark.command
@settings(max_examples=40)
@ANY_MERGE
def test_any_shapes_dtypes_and_shards(tmp_path_factory, **drawn):
    check_any_merge(tmp_path_factory.mktemp("any"), **drawn)


@pytest.mark.slow
@settings(max_examples=2000)
@ANY_MERGE
def test_any_shapes_dtypes_and_shards_at_length(tmp_path_factory, **drawn):
    check_any_merge(tmp_path_factory.mktemp("any"), **drawn)


def load_all(folder: Path, weights: str) -> dict[str, Tensor]:
    if weights == "safetensors":
        return read_checkpoint(folder)
    return {name: tensor for file in folder.glob("*.bin") for name, tensor in torch.load(file).items()}


# ----------------------------------------------------------------------------------- memory: one block at a time


class Sizes:
    """Watches every read of a checkpoint and every `combine`, and the numbers a method is handed to measure."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str):
        self.reads: dict[str, list[int]] = {}
        self.combined: dict[str, list[int]] = {}
        cls = get_method(method)
        read, combine = Checkpoint.read, cls.combine

        def watched_read(source, name, start, stop, buffer):
            self.reads.setdefault(name, []).append(stop - start)
            return read(source, name, start, stop, buffer)

        def watched_combine(this, block, statistics):
            numbers = [block.base, *block.task_vectors, *block.weights]
            sizes = {values.numel() for values in numbers if values is not None}
            self.combined.setdefault(block.region.tensor.name, []).extend(sizes | {block.region.numel})
            return combine(this, block, statistics)

        monkeypatch.setattr(Checkpoint, "read", watched_read)
        monkeypatch.setattr(cls, "combine", watched_combine)
        monkeypatch.setattr(provenance, "fingerprint", lambda weights: "")  # reads a few pages, whatever the block

    def check(self, shapes: Mapping[str, Sequence[int]], block: int, models: int, blocks: int = 100) -> None:
        """Nothing larger than a block, and everything seen: so many blocks of each tensor, or more, from each model."""
        for name in shapes:
            assert len(self.combined[name]) >= blocks
            assert len(self.reads[name]) >= blocks * models
            assert max(self.reads[name]) <= block, f"{name}: a read of {max(self.reads[name])} elements, block {block}"
            assert max(self.combined[name]) <= block, f"{name}: a combine of {max(self.combined[name])} elements"


BLOCK = 512
HUNDRED_BLOCKS: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (800, 64), "matrix.weight": (800, 64), "stack.weight": (5, 160, 64),
    "vector.weight": (100 * BLOCK,), "one_row.weight": (1, 100 * BLOCK), "long_rows.weight": (8, 12 * BLOCK + 256),
}  # fmt: skip


@pytest.fixture(scope="module")
def hundred_blocks(tmp_path_factory: pytest.TempPathFactory) -> Family:
    config = TINY | {"vocab_size": 800, "hidden_size": 64}
    return write_family(tmp_path_factory.mktemp("hundred"), HUNDRED_BLOCKS, (torch.bfloat16,) * 3, config=config)


def run_hundred_blocks(out: Path, method: str, family: Family, monkeypatch: pytest.MonkeyPatch) -> Sizes:
    patch_grid(monkeypatch, BLOCK)
    sizes = Sizes(monkeypatch, method)
    run(out, method, family.base, family.models, block_elements=BLOCK, report="full")
    return sizes


@pytest.mark.command
@pytest.mark.parametrize("method", WITHOUT_DATA)
def test_no_read_and_no_combine_exceeds_the_block(
    tmp_path: Path, hundred_blocks: Family, method: str, monkeypatch: pytest.MonkeyPatch
):
    """Tensors of 100 blocks, of every kind; whatever is added to METHODS is held to it."""
    sizes = run_hundred_blocks(tmp_path / "out", method, hundred_blocks, monkeypatch)
    sizes.check(HUNDRED_BLOCKS, BLOCK, models=len(fitting(method, hundred_blocks.models)))


def test_a_method_that_measures_more_than_a_block_is_noticed(
    tmp_path: Path, hundred_blocks: Family, monkeypatch: pytest.MonkeyPatch
):
    def greedy(self, tensor, scan):
        return list(scan(lambda block: block.base.sum(), [Region(tensor, 0, tensor.numel)]))

    monkeypatch.setattr(get_method("task_arithmetic"), "measure", greedy)
    sizes = run_hundred_blocks(tmp_path / "out", "task_arithmetic", hundred_blocks, monkeypatch)
    with pytest.raises(AssertionError, match="a read of 51200 elements, block 512"):
        sizes.check(HUNDRED_BLOCKS, BLOCK, models=2)


@pytest.mark.parametrize("method", ["ties", "widen"])
def test_no_read_and_no_combine_exceeds_the_block_as_it_is(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
):
    """The constants as they are, on a matrix of 25 blocks of 2^19 elements."""
    shapes = {"matrix.weight": (25 * BLOCK_ELEMENTS // 1024, 1024)}
    values = torch.randn(BLOCK_ELEMENTS, generator=torch.Generator().manual_seed(0)).bfloat16().repeat(25)
    base = write_checkpoint(tmp_path / "base", {"matrix.weight": values.view(-1, 1024)}, TINY)
    model = write_checkpoint(tmp_path / "model", {"matrix.weight": values.view(-1, 1024).flip(1)}, TINY)
    sizes = Sizes(monkeypatch, method)
    run(tmp_path / "out", method, base, [model])
    sizes.check(shapes, BLOCK_ELEMENTS, models=1, blocks=25)


# --------------------------------------------------------------------------------------------------- the report


def direct_report(base: Tensor, models: Sequence[Tensor], merged: Tensor) -> dict[str, Any]:
    """The numbers of a report entry, from whole tensors."""
    d = [(x.float() - base.float()).double().flatten() for x in models]
    b, out = base.double().flatten(), merged.double().flatten() - base.double().flatten()
    up, down = (torch.stack([sign * d_i > 0 for d_i in d]).any(dim=0) for sign in (1, -1))
    return {
        "relative_norm": [float(d_i.norm() / b.norm()) for d_i in d],
        "cosine": [float(d[i] @ d[j] / d[i].norm() / d[j].norm()) for i in range(len(d)) for j in range(i + 1, len(d))],
        "sign_conflicts": float((up & down).sum() / (up | down).sum()),
        "merged_relative_norm": float(out.norm() / b.norm()),
    }


def check_report(entry: Mapping[str, Any], direct: Mapping[str, Any], labels: Sequence[str]) -> None:
    """4 digits of each number agree."""
    assert list(entry["relative_norm"]) == list(labels)
    pairs = [f"{a} ~ {b}" for i, a in enumerate(labels) for b in labels[i + 1 :]]
    assert list(entry["cosine"]) == pairs
    for key, value in direct.items():
        ours = list(entry[key].values()) if isinstance(entry[key], dict) else entry[key]
        assert ours == pytest.approx(value, rel=6e-4, abs=1e-6), key


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_full_report_is_what_whole_tensors_say(pico, tmp_path: Path, method: str):
    family = pico("llama")
    arguments = ARGUMENTS[method]
    result = run(
        tmp_path / "out", method, family.base, family.models, arguments, report="full", out_dtype="float32",
        block_elements=1000,
    )  # fmt: skip
    report = result.report
    assert report["sample"] == "full"
    assert json.loads((tmp_path / "out" / "merge_recipe.json").read_text())["report"] == report
    base, *models = (load_tensors(folder) for folder in (family.base, *family.models))
    merged = load_tensors(tmp_path / "out")
    labels = [str(folder) for folder in family.models]

    def joined(tensors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
        return torch.cat([tensors[name].flatten() for name in names])

    kinds = {"model.layers.*.mlp.up_proj.weight": [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]}
    kinds["lm_head.weight"] = ["lm_head.weight"]
    for kind, names in kinds.items():
        direct = direct_report(joined(base, names), [joined(model, names) for model in models], joined(merged, names))
        check_report(report["layers"][kind], direct, labels)
    everything = sorted(base)
    direct = direct_report(
        joined(base, everything), [joined(model, everything) for model in models], joined(merged, everything)
    )
    check_report(report["all"], direct, labels)
    assert sorted(report["layers"]) == sorted({name.replace(".0.", ".*.").replace(".1.", ".*.") for name in base})
    with pytest.raises(AssertionError):
        check_report(report["all"], direct | {"sign_conflicts": direct["sign_conflicts"] + 1e-3}, labels)


def test_a_sampled_report_looks_at_one_block_in_sixteen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first block and every sixteenth after it, whatever the size of the blocks that are merged."""
    patch_grid(monkeypatch, 64)
    shapes = {"a.weight": (40, 64), "b.weight": (33 * 64 + 5,)}
    family = write_family(tmp_path, shapes)
    folders = (family.base, *family.models)
    looked_at = {"a.weight": (0, 16, 32), "b.weight": (0, 16, 32)}
    for folder in folders:  # something else in the blocks that count
        tensors = load_tensors(folder)
        for name, counted in looked_at.items():
            for block in counted:
                tensors[name].view(-1)[64 * block : 64 * (block + 1)] *= 3
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    reports = []
    for position, (block_elements, workers) in enumerate(((64, 2), (100, 1), (1000, 2), (10**6, 1))):
        out = tmp_path / f"out{position}"
        options = {"block_elements": block_elements, "workers": workers, "out_dtype": "float32"}
        reports.append(run(out, "ties", family.base, family.models, UNEQUAL, **options).report)
    assert reports[0]["sample"] == "1/16"
    assert reports.count(reports[0]) == 4
    labels = [str(folder) for folder in family.models]
    base, *models = (load_tensors(folder) for folder in folders)
    merged = load_tensors(out)

    def seen(tensor: Tensor, counted: Sequence[int]) -> Tensor:
        return torch.cat([tensor.flatten()[64 * block : 64 * (block + 1)] for block in counted])

    for name, counted in looked_at.items():
        parts = [seen(tensors[name], counted) for tensors in (base, *models, merged)]
        check_report(reports[0]["layers"][name], direct_report(parts[0], parts[1:-1], parts[-1]), labels)
        whole = [tensors[name] for tensors in (base, *models, merged)]
        everything = direct_report(whole[0], whole[1:-1], whole[-1])
        with pytest.raises(AssertionError):
            check_report(reports[0]["layers"][name], everything, labels)


def test_no_report_where_none_is_wanted(pico, tmp_path: Path):
    family = pico("llama")
    assert run(tmp_path / "out", "linear", family.base, family.models, report="none").report is None
    assert json.loads((tmp_path / "out" / "merge_recipe.json").read_text())["report"] is None


# ------------------------------------------------------------------------------------------------- files and digests


@pytest.mark.parametrize(("name", "make"), [("blake3", blake3.blake3), ("sha256", hashlib.sha256)])
@pytest.mark.parametrize("chunk_bytes", [1000, 4096, 64 << 20])
def test_digests_are_those_of_the_files(
    pico, tmp_path: Path, chunk_bytes: int, name: str, make: Any, monkeypatch: pytest.MonkeyPatch
):
    """The hash of the hashes of all chunks, while several threads write in any order."""
    assert writer.CHUNK_BYTES == 64 << 20
    monkeypatch.setattr(writer, "CHUNK_BYTES", chunk_bytes)
    family = pico("llama")
    options = {"max_shard_bytes": 30_000, "workers": 3, "block_elements": 100, "digest": "full", "digest_hash": name}
    run(tmp_path / "out", "ties", family.base, family.models, **options)
    recipe = json.loads((tmp_path / "out" / "merge_recipe.json").read_text())

    def digest(path: Path) -> str:
        content = path.read_bytes()
        chunks = [content[begin : begin + chunk_bytes] for begin in range(0, len(content), chunk_bytes)]
        return make(b"".join(make(chunk).digest() for chunk in chunks)).hexdigest()

    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 3
    assert recipe["outputs"] == {
        path.name: {"bytes": path.stat().st_size, f"{name}_64MiB": digest(path)} for path in files
    }
    assert len(recipe["inputs"]) == 4
    for entry, folder in zip(recipe["inputs"], (family.base, *family.models), strict=True):
        assert entry["model"] == str(folder)
        (described,) = entry["files"].values()
        path = folder / "model.safetensors"
        assert described[f"{name}_64MiB"] == digest(path)
        assert (described["bytes"], described["mtime_ns"]) == (path.stat().st_size, path.stat().st_mtime_ns)


@pytest.mark.parametrize("digest", ["none", "outputs"])
def test_only_the_digests_that_were_asked_for(pico, tmp_path: Path, digest: str):
    family = pico("llama")
    run(tmp_path / "out", "linear", family.base, family.models, digest=digest)
    recipe = json.loads((tmp_path / "out" / "merge_recipe.json").read_text())
    assert ("blake3_64MiB" in recipe["outputs"]["model.safetensors"]) == (digest == "outputs")
    assert all("blake3_64MiB" not in entry["files"]["model.safetensors"] for entry in recipe["inputs"])


def test_files_are_what_the_safetensors_library_and_transformers_expect(pico, tmp_path: Path):
    family = pico("mixtral")
    run(tmp_path / "out", "linear", family.base, family.models, max_shard_bytes=40_000)
    base = load_tensors(family.base)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in base.values())
    assert index["weight_map"].keys() == base.keys()
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    for file in files:
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert {index["weight_map"][name] for name in opened.keys()} == {file}  # noqa: SIM118
            for name in opened.keys():  # noqa: SIM118
                assert opened.get_tensor(name).shape == base[name].shape
        raw = (tmp_path / "out" / file).read_bytes()
        header = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
        assert len(header) % 8 == 0
        assert json.loads(header) == dict(sorted(json.loads(header).items()))
        assert sum(tensor.numel() * 2 for tensor in load_file(tmp_path / "out" / file).values()) <= 40_000


def test_tensors_of_any_dtype_are_aligned_for_mapping(tmp_path: Path):
    """float32 beside an odd number of bf16 elements; buffers of integers are copied."""
    mixed = {
        "a.weight": torch.ones(3).bfloat16(), "b.weight": torch.ones(5), "c.weight": torch.ones(1).half(),
        "d.position_ids": torch.arange(7), "e.weight": torch.ones(3, 2, dtype=torch.float64),
    }  # fmt: skip
    base = write_checkpoint(tmp_path / "base", mixed, TINY)
    tuned = {name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in mixed.items()}
    model = write_checkpoint(tmp_path / "model", tuned, TINY)
    run(tmp_path / "out", "linear", base, [model])
    merged = load_tensors(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in merged.items()} == {
        name: torch.float32 if tensor.dtype == torch.float64 else tensor.dtype for name, tensor in mixed.items()
    }
    for name, tensor in tuned.items():
        assert torch.equal(merged[name].double(), tensor.double())
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            assert (8 + length + entry["data_offsets"][0]) % merged[name].element_size() == 0


# --------------------------------------------------------------------------------- numbers that are none, or too large


def leaves_nothing(folder: Path) -> bool:
    return not (folder / "out").exists() and not (folder / "out.partial").exists()


@pytest.mark.parametrize("method", WITHOUT_DATA)
@pytest.mark.parametrize("where", ["base", "model_1"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_names_tensor_and_model(tmp_path: Path, method: str, where: str, value: float):
    family = write_family(tmp_path, {"a.weight": (20, 30), "b.weight": (40,)})
    where = where if len(fitting(method, family.models)) > 1 else where.replace("_1", "_0")
    tensors = load_tensors(tmp_path / where)
    tensors["a.weight"][11, 12] = value
    save_file(tensors, tmp_path / where / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError) as error:
        run(tmp_path / "out", method, family.base, family.models, block_elements=100)
    assert f"{tmp_path / where}: a.weight: element 342 is {value}" in str(error.value)
    assert error.value.exit_code == 1
    assert leaves_nothing(tmp_path)


def test_the_first_failure_ends_a_run_with_many_workers(tmp_path: Path):
    family = write_family(tmp_path, {f"layers.{i}.weight": (30, 30) for i in range(60)})
    tensors = {name: torch.full_like(tensor, torch.nan) for name, tensor in load_tensors(family.models[0]).items()}
    save_file(tensors, family.models[0] / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="element 0 is nan"):
        run(tmp_path / "out", "ties", family.base, family.models, workers=5, block_elements=64)
    assert leaves_nothing(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_merge_too_large_for_its_dtype_is_refused(tmp_path: Path, dtype: torch.dtype):
    large = torch.finfo(dtype).max * 0.9
    base = write_checkpoint(tmp_path / "base", {"a.weight": torch.ones(8, 8, dtype=dtype)}, TINY)
    tuned = torch.ones(8, 8, dtype=dtype)
    tuned[3, 3] = large
    model = write_checkpoint(tmp_path / "model", {"a.weight": tuned}, TINY)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(InputError, match=f"a.weight: the merge is not finite in {name}"):
        run(tmp_path / "out", "task_arithmetic", base, [model], {"lambda_": 1.5})
    assert leaves_nothing(tmp_path)
    if dtype == torch.float16:  # what the message advises
        run(tmp_path / "out", "task_arithmetic", base, [model], {"lambda_": 1.5}, out_dtype="bfloat16")


@pytest.mark.command
@pytest.mark.parametrize("method", WITHOUT_DATA)
def test_a_model_equal_to_the_base_is_a_warning(tmp_path: Path, method: str):
    family = write_family(tmp_path, {"a.weight": (20, 30), "b.weight": (40,)})
    same = fitting(method, family.models[:2])[-1]
    shutil.copy(family.base / "model.safetensors", same / "model.safetensors")
    result = run(tmp_path / "out", method, family.base, family.models)
    warning, *others = result.warnings
    assert str(same) in warning
    assert "equals the base" in warning
    assert others == (
        ["All models equal the base, and so does the output."] if get_method(method).max_models == 1 else []
    )
    recorded = json.loads((tmp_path / "out" / "merge_recipe.json").read_text())["warnings"]
    assert recorded == [*result.plan.warnings, *result.warnings]
    tensors = load_tensors(family.base)
    tensors["b.weight"][-1] += 1  # one number is a change
    save_file(tensors, same / "model.safetensors", {"format": "pt"})
    assert run(tmp_path / "other", method, family.base, family.models).warnings == []


# ------------------------------------------------------------------------------------------------------- vocabularies

TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def copy_model(
    source: Path, target: Path, change: Callable[[dict[str, Tensor]], object] = lambda tensors: None
) -> Path:
    """A copy of a one-file checkpoint, its tensors changed."""
    shutil.copytree(source, target)
    tensors = load_tensors(source)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    return target


def set_json(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, ensure_ascii=False))


def renumber(source: Path, target: Path, new_id: Callable[[int], int | None], rows: int) -> Path:
    """A copy of a model whose tokens have other ids, and whose rows lie accordingly; None leaves a token out.

    Rows that no token has are filled with 9.
    """

    def move(tensors: dict[str, Tensor]) -> None:
        for name in TABLES:
            if name in tensors:
                old = tensors[name]
                tensors[name] = torch.full((rows, old.shape[1]), 9.0, dtype=old.dtype)
                for row in range(len(old)):
                    if new_id(row) is not None:
                        tensors[name][new_id(row)] = old[row]

    def rename(content: Any) -> None:
        vocabulary = content["model"]["vocab"]
        content["model"]["vocab"] = {t: new_id(i) for t, i in vocabulary.items() if new_id(i) is not None}
        for token in content["added_tokens"]:
            token["id"] = new_id(token["id"])

    copy_model(source, target, move)
    set_json(target / "tokenizer.json", rename)
    set_json(target / "config.json", lambda config: config.update(vocab_size=rows))
    return target


def test_rows_are_matched_by_token_and_the_bases_vocabulary_is_kept(tmp_path: Path):
    """`instruct_pad` has one token more than the base: its row is left out, all others are as without it."""
    base = INPUTS / "base"
    models = [INPUTS / "math", INPUTS / "instruct_pad"]
    weights = {"weights": [0.6, 0.9], "density": [0.5, 0.8]}
    result = run(tmp_path / "out", "ties", base, models, weights, layout={"tokenizer_source": "base"})
    assert any("300 matched, 0 added, 0 filled with the owner's row, 1 dropped" in n for n in result.plan.notes)
    tensors = [load_tensors(folder) for folder in (base, *models)]
    for name in TABLES:
        assert tensors[2][name].shape[0] == 301
        tensors[2][name] = tensors[2][name][:300]
    compare(load_tensors(tmp_path / "out"), "ties", tensors[0], tensors[1:], weights)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert load_model(tmp_path / "out").config.vocab_size == 300


def test_a_base_with_the_longest_vocabulary_keeps_it(tmp_path: Path):
    """`instruct_pad` as the base: the others lack its last token, whose row stays."""
    base, models = INPUTS / "instruct_pad", [INPUTS / "math", INPUTS / "code"]
    run(tmp_path / "out", "task_arithmetic", base, models, {"weights": [0.6, 0.9]})
    tensors = [load_tensors(folder) for folder in (base, *models)]
    for name in TABLES:
        for model in tensors[1:]:  # [PAD] takes the base's row: no change
            model[name] = torch.cat([model[name], tensors[0][name][300:]])
    merged = load_tensors(tmp_path / "out")
    compare(merged, "task_arithmetic", tensors[0], tensors[1:], {"weights": [0.6, 0.9]})
    for name in TABLES:
        assert_same_bits(merged[name][300], tensors[0][name][300])


@pytest.mark.command
@pytest.mark.parametrize(("method", "block_elements"), [*((method, 1 << 17) for method in WITHOUT_DATA), ("ties", 50)])
def test_a_permuted_vocabulary_changes_no_byte(tmp_path: Path, method: str, block_elements: int):
    """Ids shuffled, rows shuffled with them: the tokens are the same, and so is the merge."""
    generator = torch.Generator().manual_seed(0)
    order = [0, 1, 2, *(3 + torch.randperm(297, generator=generator)).tolist()]
    shuffled = renumber(INPUTS / "code", tmp_path / "shuffled", order.__getitem__, 300)
    assert not torch.equal(load_tensors(shuffled)[TABLES[0]], load_tensors(INPUTS / "code")[TABLES[0]])
    for out, code in (("one", INPUTS / "code"), ("other", shuffled)):
        models = [INPUTS / "math", code, INPUTS / "instruct"]
        run(tmp_path / out, method, INPUTS / "base", models, ARGUMENTS[method], block_elements=block_elements)
    assert file_digests(tmp_path / "one") == file_digests(tmp_path / "other")


def test_a_token_that_a_model_lacks_takes_the_bases_row(tmp_path: Path):
    """Three tokens fewer, so later ones have lower ids; a base of a finer dtype is not rounded on the way."""
    gone = (7, 100, 299)
    ids = {old: new for new, old in enumerate(sorted(set(range(300)) - set(gone)))}
    small = renumber(INPUTS / "code", tmp_path / "small", ids.get, 297)
    precise = copy_model(
        INPUTS / "base", tmp_path / "base", lambda t: t.update({k: v.float() * 1.01 for k, v in t.items()})
    )
    for base in (INPUTS / "base", precise):
        out = tmp_path / f"out_{base.parent.name}"
        result = run(out, "task_arithmetic", base, [INPUTS / "math", small], {"weights": [0.6, 0.9]})
        assert any(
            "297 matched, 0 added, 3 filled with the owner's row, 0 dropped" in note for note in result.plan.notes
        )
        tensors = [load_tensors(folder) for folder in (base, INPUTS / "math", INPUTS / "code")]
        for name in TABLES:
            tensors[2][name] = tensors[2][name].to(tensors[0][name].dtype)
            tensors[2][name][list(gone)] = tensors[0][name][list(gone)]
        compare(load_tensors(out), "task_arithmetic", tensors[0], tensors[1:], {"weights": [0.6, 0.9]})


def test_padding_of_the_tables_is_no_token(tmp_path: Path):
    """A table longer than its tokenizer: left out, or matched from the tokenizer's end where the base has it too."""
    padded = renumber(INPUTS / "code", tmp_path / "padded", lambda row: row, 320)
    run(tmp_path / "plain", "ties", INPUTS / "base", [INPUTS / "math", INPUTS / "code"], {"density": 0.5})
    run(tmp_path / "out", "ties", INPUTS / "base", [INPUTS / "math", padded], {"density": 0.5})
    assert file_digests(tmp_path / "out") == file_digests(tmp_path / "plain")
    base = renumber(INPUTS / "base", tmp_path / "base", lambda row: row, 304)
    run(tmp_path / "both", "task_arithmetic", base, [INPUTS / "math", padded])
    tensors = [load_tensors(folder) for folder in (base, INPUTS / "math", padded)]
    for name in TABLES:
        tensors[1][name] = torch.cat([tensors[1][name], tensors[0][name][300:]])
        tensors[2][name] = tensors[2][name][:304]
    compare(load_tensors(tmp_path / "both"), "task_arithmetic", tensors[0], tensors[1:], {})


def test_a_table_that_cannot_be_matched_is_refused(tmp_path: Path):
    small = renumber(INPUTS / "code", tmp_path / "small", lambda row: row if row < 290 else None, 290)
    (small / "tokenizer.json").unlink()
    with pytest.raises(Refusals, match=r"expected 300 rows .* got 290, and .* has no tokenizer"):
        run(tmp_path / "out", "linear", INPUTS / "base", [INPUTS / "math", small])
    assert leaves_nothing(tmp_path)


# -------------------------------------------------------------------------------------------------------- tied heads


def untie(folder: Path, head: Callable[[Tensor], Tensor], tied: bool | None = None) -> None:
    """Store a head, made from the embedding, beside it; `tied` sets the config's word on it."""
    tensors = load_tensors(folder)
    tensors["lm_head.weight"] = head(tensors["model.embed_tokens.weight"].clone())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if tied is not None:
        set_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=tied))


@pytest.fixture
def tied_family(pico, tmp_path: Path) -> Family:
    """A copy of the qwen3 family, whose head is tied to the embedding and not stored."""
    family = pico("qwen3")
    folders = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in (family.base, *family.models)]
    assert "lm_head.weight" not in load_tensors(folders[0])
    return Family(folders[0], folders[1:])


def test_a_stored_head_equal_to_the_tied_embedding_is_left_out(tied_family: Family, tmp_path: Path):
    base, models = tied_family.base, tied_family.models
    run(tmp_path / "plain", "ties", base, models)
    untie(models[1], lambda embedding: embedding)
    result = run(tmp_path / "out", "ties", base, models)
    assert file_digests(tmp_path / "out") == file_digests(tmp_path / "plain")
    (note,) = result.plan.notes
    assert f"{models[1]}: lm_head.weight is left out" in note
    # in the base as well: never a tied head in the output
    untie(base, lambda embedding: embedding)
    result = run(tmp_path / "other", "ties", base, models)
    assert file_digests(tmp_path / "other") == file_digests(tmp_path / "plain")
    assert any(f"{base}: left out" in note and "lm_head.weight" in note for note in result.plan.notes)


@pytest.mark.parametrize("in_base", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_its_own_does_not_fit_a_tied_base(tied_family: Family, tmp_path: Path, in_base: bool, tied: bool):
    """Also where the base stores a copy of its embedding as head, which is left out."""
    untie(tied_family.models[1], lambda embedding: embedding * 2, tied)
    if in_base:
        untie(tied_family.base, lambda embedding: embedding)
    with pytest.raises(
        Refusals, match=rf"{tied_family.models[1]}: lm_head.weight: expected equal to model.embed_tokens"
    ):
        run(tmp_path / "out", "linear", tied_family.base, tied_family.models)
    assert leaves_nothing(tmp_path)


def test_a_tied_model_has_its_embedding_for_a_head(tied_family: Family, tmp_path: Path):
    """The base and one model store heads of their own, the others none, as theirs are tied."""
    base, models = tied_family.base, tied_family.models
    untie(base, lambda embedding: embedding + 0.1, tied=False)
    untie(models[0], lambda embedding: embedding - 0.1, tied=False)
    result = run(tmp_path / "out", "task_arithmetic", base, models, {"weights": UNEQUAL["weights"]})
    assert sum("lm_head.weight is tied to model.embed_tokens.weight there" in note for note in result.plan.notes) == 2
    tensors = [load_tensors(folder) for folder in (base, *models)]
    for model in tensors[2:]:
        model["lm_head.weight"] = model["model.embed_tokens.weight"]
    merged = load_tensors(tmp_path / "out")
    compare(merged, "task_arithmetic", tensors[0], tensors[1:], {"weights": UNEQUAL["weights"]})
    assert torch.equal(load_model(tmp_path / "out").lm_head.weight, merged["lm_head.weight"])


def test_a_tied_model_that_lacks_a_token_takes_the_bases_row_of_the_head(tied_family: Family, tmp_path: Path):
    base = tied_family.base
    untie(base, lambda embedding: embedding + 0.1, tied=False)
    small = renumber(tied_family.models[0], tmp_path / "small", lambda row: row if row < 295 else None, 295)
    run(tmp_path / "out", "task_arithmetic", base, [small])
    ours, theirs = load_tensors(base), load_tensors(small)
    table = theirs["model.embed_tokens.weight"]
    theirs["lm_head.weight"] = torch.cat([table, ours["lm_head.weight"][295:]])
    theirs["model.embed_tokens.weight"] = torch.cat([table, ours["model.embed_tokens.weight"][295:]])
    merged = load_tensors(tmp_path / "out")
    compare(merged, "task_arithmetic", ours, [theirs], {})
    assert_same_bits(merged["lm_head.weight"][295:], ours["lm_head.weight"][295:])


def test_a_tied_head_that_the_base_lacks_is_never_written(tied_family: Family, tmp_path: Path):
    for model in tied_family.models:
        untie(model, lambda embedding: embedding)
    run(tmp_path / "out", "linear", tied_family.base, tied_family.models)
    assert sorted(load_tensors(tmp_path / "out")) == sorted(load_tensors(tied_family.base))
    load_model(tmp_path / "out")


# --------------------------------------------------------------------------------------------------- inputs at rest


def test_a_file_that_changes_during_the_merge_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    family = write_family(tmp_path, {"a.weight": (20, 30)})
    read = Checkpoint.read

    def touching(source, name, start, stop, buffer):
        path = family.models[0] / "model.safetensors"
        path.touch()
        return read(source, name, start, stop, buffer)

    monkeypatch.setattr(Checkpoint, "read", touching)
    with pytest.raises(InputError, match="changed while it was read"):
        run(tmp_path / "out", "linear", family.base, family.models)
    assert leaves_nothing(tmp_path)


def test_inputs_are_left_as_they_were(tmp_path: Path, pico):
    family = pico("llama")
    before = {path: path.stat().st_mtime_ns for path in family.base.parent.rglob("*")}
    run(tmp_path / "out", "ties", family.base, family.models)
    assert {path: path.stat().st_mtime_ns for path in family.base.parent.rglob("*")} == before


@pytest.mark.parametrize("fails", ["never", "in the plan", "in the stream"])
def test_inputs_are_closed_however_a_merge_ends(tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch):
    shapes = {"a.weight": (20, 30)}
    family = write_family(tmp_path, shapes)
    if fails == "in the plan":
        write_checkpoint(family.models[1], {"a.weight": torch.ones(20, 31)}, TINY)
    elif fails == "in the stream":
        write_checkpoint(family.models[1], {"a.weight": torch.full((20, 30), torch.nan)}, TINY)
    closed: list[Checkpoint] = []
    close = Checkpoint.close
    monkeypatch.setattr(Checkpoint, "close", lambda self: closed.append(self) or close(self))
    with nullcontext() if fails == "never" else pytest.raises(InputError):
        run(tmp_path / "out", "ties", family.base, family.models)
    assert len(set(map(id, closed))) == 4  # the base and three models
    for checkpoint in closed:
        with pytest.raises(InputError, match="cannot be read"):
            checkpoint.read("a.weight", 0, 1, torch.empty(8, dtype=torch.uint8))


# ------------------------------------------------------------------------------------------------------------ on a GPU


def test_what_is_sent_to_a_gpu_waits_for_it_and_it_for_that(monkeypatch: pytest.MonkeyPatch):
    """The order of a GPU's streams, recorded without one."""
    log: list[tuple[str, ...]] = []

    class Recorded:
        def __init__(self, name: str):
            self.name = name

        def wait_stream(self, other: Recorded) -> None:
            log.append((self.name, "waits for", other.name))

        def __enter__(self) -> None:
            log.append((self.name, "begins"))

        def __exit__(self, *arguments: object) -> None:
            log.append((self.name, "ends"))

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Recorded("sending"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Recorded("working"))
    monkeypatch.setattr(torch.cuda, "stream", lambda one: one)
    values = torch.zeros(3)
    thread = threading.Thread(target=stream.send, args=(torch.tensor([1.0, 2.0, 3.0]).bfloat16(), values))
    thread.start()  # with a stream of its own
    thread.join()
    assert values.tolist() == [1.0, 2.0, 3.0]
    assert log == [
        ("sending", "waits for", "working"), ("sending", "begins"), ("sending", "ends"), ("working", "waits for", "sending"),
    ]  # fmt: skip
