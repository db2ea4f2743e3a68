"""Vocabularies of the output: matched by token, united, taken from a model, padded; the files follow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import performAIM
from alignment.layout import Layout
from checkpoints.errors import InputError
from checkpoints.vocabulary import MISSING, Vocabulary, match_rows, read_vocabulary
from tests.scene import Scene, call
from tests.token_models import (
    KINDS,
    TABLES,
    change_json,
    check_rows,
    make_model,
    merging_scene,
    relax,
    row_of,
    tables,
    write_bpe,
    write_json,
)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return merging_scene(tmp_path)


# ----------------------------------------------------------------------------------------------------- the union


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_of_a_union_has_its_own_row(scene: Scene, kind: str):
    """Two models that add tokens under the same ids; one of them adds one that the other has too."""
    base = make_model(scene.folder / "base", kind)
    one = make_model(scene.folder / "one", kind, ["[PAD]", "<|x|>"])
    two = make_model(scene.folder / "two", kind, ["<|y|>", "<|x|>"])
    known = read_vocabulary(base, "base")
    assert known is not None
    owners = {**dict.fromkeys(known.ids, "base"), "[PAD]": "one", "<|x|>": "one", "<|y|>": "two"}
    said = scene.merge(base, [one, two], "--new_token_rows", "owner").err
    size = known.size
    tokenizer = check_rows(scene.out, owners.__getitem__, size + 3)
    assert [tokenizer.convert_tokens_to_ids(token) for token in ("[PAD]", "<|x|>", "<|y|>")] == [
        size,
        size + 1,
        size + 2,
    ]
    for token in ("[PAD]", "<|x|>", "<|y|>"):
        ids = tokenizer.encode(f"hello{token}world", add_special_tokens=False)
        assert tokenizer.convert_tokens_to_ids(token) in ids
        assert token in tokenizer.decode(ids)
        if kind != "sentence piece":  # whose added_tokens.json does not tell what is special
            assert token not in tokenizer.decode(ids, skip_special_tokens=True)
    assert f"is that of {base} and 3 added tokens: '[PAD]', '<|x|>', '<|y|>'." in said
    assert f"{base}: vocabulary rows are matched by token: {size} matched, 0 added, 3 filled" in said
    assert f"{one}: vocabulary rows are matched by token: {size} matched, 2 added, 1 filled" in said
    assert f"{two}: vocabulary rows are matched by token: {size + 1} matched, 1 added, 1 filled" in said
    assert scene.json("merge_recipe.json")["tokenizer_source"] == "union"


@pytest.mark.parametrize("keep", [True, False])
def test_tokenizers_of_two_kinds(scene: Scene, keep: bool):
    """The base has a tokenizer.json, with or without the tokenizer.model it was made of; the model has that alone."""
    from transformers import AutoTokenizer

    base = make_model(scene.folder / "base", "sentence piece")
    AutoTokenizer.from_pretrained(base).save_pretrained(base)
    assert (base / "tokenizer.json").is_file()
    if not keep:
        (base / "tokenizer.model").unlink()
    one = make_model(scene.folder / "one", "sentence piece", ["[PAD]"])
    scene.merge(base, [one])
    known = read_vocabulary(base, "base")
    assert known is not None
    check_rows(scene.out, lambda token: "one" if token == "[PAD]" else "base", known.size + 1)
    assert (scene.out / "added_tokens.json").is_file() == keep


def test_a_new_token_is_merged_where_several_models_have_it(scene: Scene):
    """The base has the mean m of their rows, m + 0.25 (one - m) + 0.5 (two - m); or the first's, one + 0.5 (two - one)."""
    base = make_model(scene.folder / "base", "bpe")
    models = [make_model(scene.folder / name, "bpe", ["[PAD]"]) for name in ("one", "two")]
    flags = ("--method", "task_arithmetic", "--dtype", "float32")
    one, two = row_of("one", "[PAD]"), row_of("two", "[PAD]")
    mean = (one + two) / 2
    said = scene.merge(base, models, *flags, "--weights", "0.25,0.5").err
    expected = mean + 0.25 * (one - mean) + 0.5 * (two - mean)
    assert set(tables(scene.out)[TABLES[0]][-1].tolist()) == {expected}
    assert "1 filled with the mean of the owners' rows" in said
    assert scene.json("merge_recipe.json")["new_token_rows"] == "owners_mean"
    scene.merge(base, models[::-1], *flags, "--weights", "0.5,0.25")
    assert set(tables(scene.out)[TABLES[0]][-1].tolist()) == {expected}
    scene.merge(base, models, *flags, "--weights", "0.25,0.5", "--new_token_rows", "owner")
    assert set(tables(scene.out)[TABLES[0]][-1].tolist()) == {one + 0.5 * (two - one)}
    assert scene.json("merge_recipe.json")["new_token_rows"] == "owner"


def test_the_mean_of_owners_where_each_token_has_others(scene: Scene):
    """<|x|> is one's and two's, <|y|> is two's and three's, <|z|> is three's alone; a model that lacks one has the same mean."""
    base = make_model(scene.folder / "base", "bpe")
    tokens = {"one": ["<|x|>"], "two": ["<|x|>", "<|y|>"], "three": ["<|y|>", "<|z|>"]}
    models = [make_model(scene.folder / name, "bpe", added) for name, added in tokens.items()]
    scene.merge(base, models, "--dtype", "float32")  # lambda 0: the base
    rows = tables(scene.out)[TABLES[0]][-3:, 0].tolist()
    assert rows == [
        (row_of("one", "<|x|>") + row_of("two", "<|x|>")) / 2,
        (row_of("two", "<|y|>") + row_of("three", "<|y|>")) / 2,
        row_of("three", "<|z|>"),
    ]
    scene.merge(base, models, "--method", "task_arithmetic", "--weights", "1,0,0", "--dtype", "float32")
    assert tables(scene.out)[TABLES[0]][-3:, 0].tolist() == [row_of("one", "<|x|>"), *rows[1:]]


def test_mean_rows(scene: Scene):
    """[PAD] in the base and in `two` is the mean of their own rows; 0.25 of one's and 0.75 of two's change are added."""
    base = make_model(scene.folder / "base", "bpe")
    models = [make_model(scene.folder / "one", "bpe", ["[PAD]"]), make_model(scene.folder / "two", "bpe")]
    flags = ("--method", "task_arithmetic", "--weights", "0.25,0.75", "--new_token_rows", "mean", "--dtype", "float32")
    said = scene.merge(base, models, *flags).err
    assert "1 filled with the mean row" in said
    mean = {folder: load_file(folder / "model.safetensors")[TABLES[0]].float().mean(0) for folder in (base, models[1])}
    start, two = (mean[folder].bfloat16().float() for folder in (base, models[1]))
    expected = start + 0.25 * (row_of("one", "[PAD]") - start) + 0.75 * (two - start)
    torch.testing.assert_close(tables(scene.out)[TABLES[0]][-1], expected)
    assert scene.json("merge_recipe.json")["new_token_rows"] == "mean"


def test_the_bases_own_vocabulary(scene: Scene):
    base = make_model(scene.folder / "base", "bpe", ["[BASE]"])
    one = make_model(scene.folder / "one", "bpe", ["[PAD]"], eos_token_id=[2, 290])
    said = scene.merge(base, [one], "--tokenizer_source", "base").err
    assert "0 added, 1 filled with the owner's row, 1 dropped" in said
    known = read_vocabulary(base, "base")
    assert known is not None
    check_rows(scene.out, lambda token: "base", known.size)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (scene.out / name).read_bytes() == (base / name).read_bytes()


def test_another_models_vocabulary(scene: Scene):
    """Its tokenizer, chat template, generation config and ids; the base's tokens that it lacks are dropped."""
    base = make_model(scene.folder / "base", "bpe", ["[BASE]", "<|image|>"], image_token_id=291)
    one = make_model(scene.folder / "one", "bpe", ["<|image|>", "<|end|>"], eos_token_id=[2, 291], pad_token_id=291)
    (one / "chat_template.jinja").write_text("{{ messages }}")
    (base / "chat_template.jinja").write_text("base")
    said = scene.merge(base, [one], "--tokenizer_source", str(one)).err
    assert (
        f"{base}: vocabulary rows are matched by token: 291 matched, 0 added, 1 filled with the owner's row, 1 dropped"
        in said
    )
    check_rows(scene.out, lambda token: "one" if token == "<|end|>" else "base", 292)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (scene.out / name).read_bytes() == (one / name).read_bytes()
    config = scene.json("config.json")
    assert (config["eos_token_id"], config["pad_token_id"], config["image_token_id"]) == ([2, 291], 291, 290)


def test_ends_of_text_and_chat_template_are_united(scene: Scene):
    """One ends at 290 of its own, which is 291 in the output, as `two` adds a token before it."""
    base = make_model(scene.folder / "base", "bpe")
    two = make_model(scene.folder / "two", "bpe", ["<|y|>"])
    one = make_model(scene.folder / "one", "bpe", ["<|end|>"], eos_token_id=[290, 2])
    change_json(one / "tokenizer_config.json", chat_template="{{ messages }}")
    said = scene.merge(base, [two, one]).err
    assert "note: the output's text ends at any of '" in said
    assert f"note: the chat template is that of {one}." in said
    assert scene.json("config.json")["eos_token_id"] == scene.json("generation_config.json")["eos_token_id"] == [2, 291]
    tokenizer = check_rows(scene.out, lambda token: {"<|end|>": "one", "<|y|>": "two"}.get(token, "base"), 292)
    assert tokenizer.chat_template == "{{ messages }}"
    (base / "chat_template.jinja").write_text("base")
    assert "chat template" not in scene.merge(base, [two, one]).err
    assert (scene.out / "chat_template.jinja").read_text() == "base"


def test_a_union_without_new_tokens_unites_the_ends_of_text(scene: Scene):
    base = make_model(scene.folder / "base", "bpe")
    one = make_model(scene.folder / "one", "bpe", eos_token_id=[7, 2])
    scene.merge(base, [one], "--tokenizer_source", "base")  # what the user chose stays
    assert scene.json("generation_config.json")["eos_token_id"] == 2
    scene.merge(base, [one])
    assert scene.json("generation_config.json")["eos_token_id"] == [2, 7]
    scene.merge(base, [one], "--tokenizer_source", "union")
    assert scene.json("generation_config.json")["eos_token_id"] == [2, 7]
    assert (scene.out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


# -------------------------------------------------------------------------------------------------------- padding


def test_padding_to_a_multiple(scene: Scene):
    """292 tokens on 320 rows; the rows that nobody has are the mean of the base's, so that no logit stands out."""
    base = make_model(scene.folder / "base", "bpe")
    models = [make_model(scene.folder / name, "bpe", [token]) for name, token in (("one", "<|x|>"), ("two", "<|y|>"))]
    scene.merge(base, models, "--pad_to_multiple_of", "64")
    check_rows(scene.out, lambda token: {"<|x|>": "one", "<|y|>": "two"}.get(token, "base"), 292)
    stored = tables(scene.out)
    assert scene.json("config.json")["vocab_size"] == 320
    for name, table in load_file(base / "model.safetensors").items():
        if name in TABLES:
            assert torch.equal(stored[name][292:], table.double().mean(0).bfloat16().expand(28, -1))


def test_new_tokens_take_the_place_of_padding(scene: Scene):
    """290 tokens on 300 rows, and a model with another one there, as Qwen's fine-tunes do: still 300 rows."""
    base = make_model(scene.folder / "base", "bpe", padding=10)
    one = make_model(scene.folder / "one", "bpe", ["<|x|>"], padding=9)
    assert "the vocabulary tables get" not in scene.merge(base, [one]).err
    check_rows(scene.out, lambda token: "one" if token == "<|x|>" else "base", 291)
    assert {name: len(table) for name, table in tables(scene.out).items()} == dict.fromkeys(TABLES, 300)
    assert scene.json("config.json")["vocab_size"] == 300
    assert set(tables(scene.out)[TABLES[0]][291:].flatten().tolist()) == {77.0}


def test_a_token_without_a_row_is_none_of_the_models(scene: Scene):
    """A tokenizer that got a token which the tables did not: nothing is added, unless another model has a row for it."""
    base = make_model(scene.folder / "base", "bpe")
    one = make_model(scene.folder / "one", "bpe")
    write_bpe(one, ["[PAD]"])
    scene.merge(base, [one])
    assert len(tables(scene.out)[TABLES[0]]) == 290
    write_bpe(base, ["[PAD]"])
    two = make_model(scene.folder / "two", "bpe", ["[PAD]"])
    scene.merge(base, [one, two])
    check_rows(scene.out, lambda token: "two" if token == "[PAD]" else "base", 291)


def test_padding_without_tokenizers(scene: Scene):
    base, one = (make_model(scene.folder / name, "bpe") for name in ("base", "one"))
    for folder in (base, one):
        (folder / "tokenizer.json").unlink()
    scene.merge(base, [one], "--pad_to_multiple_of", "64")
    table = load_file(base / "model.safetensors")[TABLES[1]]
    assert torch.equal(tables(scene.out)[TABLES[1]][:290], table)
    assert scene.json("config.json")["vocab_size"] == 320
    assert (
        "has no tokenizer"
        in scene.merge(base, [one], "--tokenizer_source", "union", "--pad_to_multiple_of=64", code=1).err
    )


# ------------------------------------------------------------------------------------------------------- refusals


def test_flags_that_do_not_fit(scene: Scene):
    base, one = (make_model(scene.folder / name, "bpe") for name in ("base", "one"))
    says = f"--tokenizer_source: expected one of base, union, {one}, got 'unoin'."
    assert says in scene.merge(base, [one], "--tokenizer_source", "unoin", code=2).err
    says = "--new_token_rows: unknown value 'meen'. Did you mean 'mean'?"
    assert says in scene.merge(base, [one], "--new_token_rows", "meen", code=2).err
    with pytest.raises(InputError, match="pad_to_multiple_of: expected a whole number above 0, got 0"):
        Layout(pad_to_multiple_of=0)
    says = "--tie_word_embeddings: unknown value 'maybe'."
    assert says in scene.merge(base, [one], "--tie_word_embeddings", "maybe", code=2).err


def test_a_tokenizer_that_cannot_take_more_tokens_is_refused(scene: Scene):
    """A hole in its ids: the library would give a new token another id than the next one."""
    base = make_model(scene.folder / "base", "word piece", padding=30)
    content = json.loads((base / "tokenizer.json").read_text())
    content["model"]["vocab"]["fox"] += 20
    write_json(base / "tokenizer.json", content)
    one = make_model(scene.folder / "one", "word piece", ["[PAD]"])
    says = "its tokenizer cannot take more tokens: '[PAD]' would get the id"
    assert says in scene.merge(base, [one], code=1).err
    assert not scene.out.exists()


# --------------------------------------------------------------------------------------------- relaxing a merge


def test_relaxing_a_model_with_more_tokens(scene: Scene):
    """The row of the head that the base lacks stays as merged, or is relaxed towards the mean of the base's rows."""
    base = make_model(scene.folder / "base", "bpe")
    merged = make_model(scene.folder / "merged", "bpe", ["[PAD]"])
    stored = load_file(merged / "model.safetensors")[TABLES[1]]
    owner = relax(base, merged, scene.folder / "owner")[TABLES[1]]
    mean = relax(base, merged, scene.folder / "mean", "--new_token_rows", "mean")[TABLES[1]]
    assert torch.equal(owner[-1], stored[-1])
    assert not torch.equal(mean[-1], stored[-1])
    assert torch.equal(owner[:-1], mean[:-1])
    assert not torch.equal(owner[:-1], stored[:-1])
    flags = ["--merged_model", str(merged), "--pretrained_model_name", str(base), "--save_path", str(scene.out)]
    call(performAIM, *flags, "--numerics", "reference", "--new_token_rows", "owner", code=2)


def test_merging_and_relaxing_in_one_run_with_more_tokens(scene: Scene):
    """omega 1 is the plain union; a lower one leaves the new token's row as it is, as base and owner agree on it."""
    base = make_model(scene.folder / "base", "bpe")
    one = make_model(scene.folder / "one", "bpe", ["[PAD]"])
    scene.merge(base, [one], "--method", "task_arithmetic")
    plain = tables(scene.out)[TABLES[1]]
    calibration = scene.folder / "texts.jsonl"
    calibration.write_text("".join(json.dumps({"text": f"hello world {i}"}) + "\n" for i in range(99)))
    how = ["--calibration_data", str(calibration), "--n_samples", "8", "--block_size", "16"]
    for omega in ("1", "0.2"):
        scene.merge(base, [one], "--method", "task_arithmetic", "--omega", omega, *how)
        head = tables(scene.out)[TABLES[1]]
        assert torch.equal(head, plain) == (omega == "1")
        assert torch.equal(head[-1], plain[-1])


# ----------------------------------------------------------------------------------------------------------- rows


def test_a_large_vocabulary_in_any_order():
    """256 thousand tokens, shuffled: every token's own row."""
    count = 256_000
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    ours = Vocabulary({f"t{token}": token for token in range(count)})
    theirs = Vocabulary({f"t{token}": row for row, token in enumerate(order.tolist())})
    rows = match_rows(ours, count + 64, theirs, count)
    assert torch.equal(order[rows[:count]], torch.arange(count))
    assert set(rows[count:].tolist()) == {MISSING}
