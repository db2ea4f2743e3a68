"""`tokenizer.tokens` of a recipe: whose row each of some tokens has, in models that lack it, or in all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import merge
from merging.recipe_file import read_recipe_file
from tests.token_models import make_model, row_of, tables

TOKENS = ("<|a|>", "<|b|>", "<|ab|>")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "base": make_model(folder / "base", "bpe"),
        "one": make_model(folder / "one", "bpe", ["<|a|>", "<|ab|>"]),
        "two": make_model(folder / "two", "bpe", ["<|b|>", "<|ab|>"]),
    }


def write(folder: Path, models: dict[str, Path], tokens: dict[str, Any], **more: Any) -> Path:
    """A recipe whose merge is the mean of both models' rows, and the rows of each model that lacks a token."""
    content = {
        "merge_method": "linear",
        "base_model": str(models["base"]),
        "models": [{"model": str(models[name]), "parameters": {"weight": 0.5}} for name in ("one", "two")],
        "tokenizer": {"source": "union", "tokens": tokens},
        "out_dtype": "float32",
        **more,
    }
    path = folder / "recipe.yml"
    path.write_text(json.dumps(content))
    return path


def merged(path: Path) -> tuple[dict[str, int], Tensor]:
    """Ids of the output's tokens, and its embedding."""
    out = path.parent / "out"
    assert merge.main(["--config", str(path), "--save_path", str(out), "--quiet", "--report", "none"]) == 0
    ids = {
        **json.loads((out / "tokenizer.json").read_text())["model"]["vocab"],
        **{one["content"]: one["id"] for one in json.loads((out / "tokenizer.json").read_text())["added_tokens"]},
    }
    embedding, head = (tables(out)[name] for name in ("model.embed_tokens.weight", "lm_head.weight"))
    assert (embedding == -head).all()
    return ids, embedding


def row(ids: dict[str, int], embedding: Tensor, token: str) -> float:
    (value,) = set(embedding[ids[token]].tolist())
    return float(value)


def test_each_source_and_force(models: dict[str, Path], tmp_path: Path) -> None:
    one, two = (str(models[name]) for name in ("one", "two"))
    ids, embedding = merged(
        write(
            tmp_path,
            models,
            {
                "<|a|>": {"source": {"kind": "zero"}},
                "<|b|>": {"source": {"kind": "model_token", "model": one, "token": "<|a|>"}},
                "<|ab|>": {"source": {"model": {"path": two}}, "force": True},
                "<s>": {"source": {"kind": "model_token", "model": two, "token_id": 5}, "force": True},
            },
        )
    )
    # Only a model that lacks the token gets the row; forced, every model does.
    assert row(ids, embedding, "<|a|>") == pytest.approx((row_of("one", "<|a|>") + 0) / 2)
    assert row(ids, embedding, "<|b|>") == pytest.approx((row_of("one", "<|a|>") + row_of("two", "<|b|>")) / 2)
    assert row(ids, embedding, "<|ab|>") == row_of("two", "<|ab|>")
    fifth = next(token for token, index in json.loads((models["two"] / "tokenizer.json").read_text())["model"]["vocab"].items() if index == 5)  # fmt: skip
    assert row(ids, embedding, "<s>") == row_of("two", fifth)
    assert row(ids, embedding, "</s>") == (row_of("one", "</s>") + row_of("two", "</s>")) / 2


def test_merge_recipe_json_says_the_same_again(models: dict[str, Path], tmp_path: Path) -> None:
    one = str(models["one"])
    path = write(tmp_path, models, {"<|b|>": {"source": one, "force": False}, "<|a|>": {"source": {"kind": "zero"}, "force": True}}.copy() | {"<|b|>": {"source": {"kind": "model_token", "model": one, "token": "<|ab|>"}}})  # fmt: skip
    _, embedding = merged(path)
    again = read_recipe_file(tmp_path / "out" / "merge_recipe.json")
    assert again.layout.tokens == read_recipe_file(path).layout.tokens
    assert merge.main(["--config", str(tmp_path / "out" / "merge_recipe.json"), "--save_path", str(tmp_path / "again"), "--quiet"]) == 0  # fmt: skip
    assert (tables(tmp_path / "again")["model.embed_tokens.weight"] == embedding).all()
    notes = json.loads((tmp_path / "out" / "merge_recipe.json").read_text())["notes"]
    assert f"{models['two']}: rows of 1 tokens are those that the recipe says." in notes


def test_forced_rows_where_all_vocabularies_are_the_same(models: dict[str, Path], tmp_path: Path) -> None:
    same = {"base": models["one"], "one": models["one"], "two": make_model(tmp_path / "same", "bpe", ["<|a|>", "<|ab|>"])}  # fmt: skip
    path = write(tmp_path, same, {"<|a|>": {"source": str(same["two"]), "force": True}})
    ids, embedding = merged(path)
    assert row(ids, embedding, "<|a|>") == row_of("same", "<|a|>")
    assert row(ids, embedding, "<|ab|>") == (row_of("one", "<|ab|>") + row_of("same", "<|ab|>")) / 2


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"nowhere at all": {"source": {"kind": "zero"}}}, "tokenizer.tokens: nowhere at all: expected a token of the output's vocabulary. Leave it out."),
        ({"<|a|>": {"source": "org/other"}}, "tokenizer.tokens: <|a|>: expected one of the models {base}, {one}, {two}, got org/other. Name one of them."),
        ({"<|a|>": {"source": "{two}"}}, "tokenizer.tokens: <|a|>: {two} has no row for <|a|>. Name another token, or another model."),
        ({"<|a|>": {"source": {"kind": "model_token", "model": "{two}", "token_id": 9999}}}, "tokenizer.tokens: <|a|>: {two} has no row for 9999. Name another token, or another model."),
        ({"<|a|>": {"source": {"kind": "mean"}}}, "tokenizer.tokens.<|a|>.source.kind: unknown kind 'mean'."),
        ({"<|a|>": {"source": {"kind": "zero"}, "force": 1}}, "tokenizer.tokens.<|a|>.force: expected true or false, got 1."),
        ({"<|a|>": {"source": {"kind": "model_token", "model": "{two}", "token_id": 1, "token": "x"}}}, "tokenizer.tokens.<|a|>.source: expected token, a text, or token_id, a number. Give one of them."),
        ({"<|a|>": {"force": True}}, "tokenizer.tokens.<|a|>: expected the key source, got"),
    ],
)  # fmt: skip
def test_refusals(
    tokens: dict[str, Any], message: str, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {name: str(path) for name, path in models.items()}
    content = json.dumps(tokens)
    for name, path in names.items():
        content = content.replace("{" + name + "}", path)
    recipe = write(tmp_path, models, json.loads(content))
    assert merge.main(["--config", str(recipe), "--save_path", str(tmp_path / "out"), "--quiet"]) in (1, 2)
    assert message.format(**names) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
