"""Heads tied to the embedding and heads of their own, in any mix; `--tie_word_embeddings`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.scene import Scene
from tests.token_models import TABLES, change_json, make_model, merging_scene, relax, tables

EMBEDDING, HEAD = TABLES


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return merging_scene(tmp_path)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def store_head(folder: Path, factor: float, tied: bool) -> None:
    """Give a model a stored head, made from its embedding."""
    rewrite(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] * factor}))
    change_json(folder / "config.json", tie_word_embeddings=tied)


def loaded(folder: Path) -> tuple[Tensor, Tensor]:
    """Embedding and head, as transformers loads them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()


def test_a_tied_output_with_a_head_of_its_own(scene: Scene):
    """The base and `two` are tied; `one` has a head of its own, which the output can have, too: 0.5 of its change."""
    base, two = (make_model(scene.folder / name, "bpe", tied=True) for name in ("base", "two"))
    one = make_model(scene.folder / "one", "bpe")
    flags = ("--method", "task_arithmetic", "--weights", "0.5,0", "--dtype", "float32")
    said = scene.merge(base, [one, two], *flags, code=1).err
    assert f"{one}: {HEAD}: expected equal to {EMBEDDING}, to which {base} ties it, got other numbers." in said
    assert "Use --tie_word_embeddings no, which gives the output a head of its own." in said
    said = scene.merge(base, [one, two], *flags, "--tie_word_embeddings", "no").err
    assert f"note: {base}: {HEAD} is tied to {EMBEDDING} there; the output gets a head of its own." in said
    assert f"note: {two}: {HEAD} is tied to {EMBEDDING} there; that is used for it." in said
    start, other = (load_file(folder / "model.safetensors") for folder in (base, one))
    embedding, head = loaded(scene.out)
    first = start[EMBEDDING].float()
    torch.testing.assert_close(embedding, first + 0.5 * (other[EMBEDDING].float() - first))
    torch.testing.assert_close(head, first + 0.5 * (other[HEAD].float() - first))
    assert scene.json("config.json")["tie_word_embeddings"] is False
    assert scene.json("merge_recipe.json")["tie_word_embeddings"] is False


@pytest.mark.parametrize("word", ["yes", "no"])
def test_what_the_base_has_already(scene: Scene, word: str):
    """A flag that says what the base does changes no byte of weights and config."""
    base, one = (make_model(scene.folder / name, "bpe", tied=word == "yes") for name in ("base", "one"))
    scene.merge(base, [one], "--lambda", "0.5")
    plain = {name: (scene.out / name).read_bytes() for name in ("model.safetensors", "config.json")}
    scene.merge(base, [one], "--lambda", "0.5", "--tie_word_embeddings", word)
    assert {name: (scene.out / name).read_bytes() for name in plain} == plain


def test_an_untied_base_whose_head_is_its_embedding(scene: Scene):
    base, one, two = (make_model(scene.folder / name, "bpe", tied=True) for name in ("base", "one", "two"))
    for folder in (base, one):
        store_head(folder, 1.0, tied=False)
    said = scene.merge(base, [one, two], "--tie_word_embeddings", "yes").err
    assert f"note: {base}: {HEAD} is left out, as it equals {EMBEDDING}, to which the output ties it." in said
    assert f"note: {one}: {HEAD} is left out, as it equals {EMBEDDING}, to which the output ties it." in said
    assert list(tables(scene.out)) == [EMBEDDING]
    assert scene.json("config.json")["tie_word_embeddings"] is True
    embedding, head = loaded(scene.out)
    assert torch.equal(embedding, head)


@pytest.mark.parametrize("whose", ["base", "one"])
def test_heads_that_differ_cannot_be_tied(scene: Scene, whose: str):
    for name in ("base", "one"):
        store_head(make_model(scene.folder / name, "bpe", tied=True), 2.0 if name == whose else 1.0, tied=False)
    said = scene.merge(scene.folder / "base", [scene.folder / "one"], "--tie_word_embeddings", "yes", code=1).err
    assert str(scene.folder / whose) in said
    assert HEAD in said
    assert not scene.out.exists()


def test_a_base_that_says_tied_and_stores_a_head_of_its_own(scene: Scene):
    """Loading compares them and unties; other programs believe config.json, so it tells the truth in the output."""
    base, one = (make_model(scene.folder / name, "bpe", tied=True) for name in ("base", "one"))
    store_head(base, 2.0, tied=True)
    store_head(one, 2.0, tied=False)
    said = scene.merge(base, [one]).err
    assert f"note: {base}: its head is not its embedding; config.json says so in the output." in said
    assert scene.json("config.json")["tie_word_embeddings"] is False
    embedding, head = loaded(scene.out)
    assert torch.equal(head, 2 * embedding)


def test_a_union_of_tied_and_untied_models(scene: Scene):
    """A new token's row of the head is that of its owner's embedding, where that is its head."""
    base = make_model(scene.folder / "base", "bpe")
    one = make_model(scene.folder / "one", "bpe", ["<|x|>"], tied=True)
    two = make_model(scene.folder / "two", "bpe", ["<|y|>"])
    scene.merge(base, [one, two])
    embedding, head = (tables(scene.out)[name] for name in TABLES)
    assert torch.equal(head[290], embedding[290])
    assert torch.equal(head[291], -embedding[291])
    assert torch.equal(head[:290], load_file(base / "model.safetensors")[HEAD])


def test_relaxing_a_tied_merge_of_an_untied_base(scene: Scene):
    """Head and embedding of the base differ: the merge gets a head of its own, relaxed towards the base's."""
    base = make_model(scene.folder / "base", "bpe")
    merged = make_model(scene.folder / "merged", "bpe", tied=True)
    out = relax(base, merged, scene.folder / "relaxed", "--tie_word_embeddings", "no")
    stored = load_file(merged / "model.safetensors")[EMBEDDING]
    assert torch.equal(out[EMBEDDING], stored)
    assert out[HEAD].shape == stored.shape
    assert not torch.equal(out[HEAD], stored)
