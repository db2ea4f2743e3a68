"""Chat templates and tokenizer files of the output, where a user chose others than its vocabulary brings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import merge
import performAIM
from checkpoints.chat_templates import (
    end_markers,
    foreign_markers,
    known_templates,
    read_template,
    set_templates,
    templates_of,
)
from checkpoints.errors import InputError
from checkpoints.sidecars import SideFiles
from tests.fake_hub import FakeHub
from tests.scene import Scene, call
from tests.token_models import change_json, check_rows, make_model, merging_scene, relax, write_json

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "world"},
    {"role": "user", "content": "the fox"},
]
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
# name -> the chat, and its second message alone with the start of an answer; of a tokenizer with <s> and </s>.
RENDERED = {
    "alpaca": (
        "<s>Be brief.\n\n### Instruction:\nhello\n\n### Response:\nworld</s>\n\n### Instruction:\nthe fox\n\n",
        f"<s>{ALPACA}\n\n### Instruction:\nhello\n\n### Response:\n",
    ),
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\nworld<|im_end|>\n<|im_start|>user\nthe fox<|im_end|>\n",
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    ),
    "exaone": (
        "[|system|]Be brief.[|endofturn|]\n[|user|]hello\n[|assistant|]world[|endofturn|]\n[|user|]the fox\n",
        "[|system|][|endofturn|]\n[|user|]hello\n[|assistant|]",
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nworld<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nthe fox<|eot_id|>",
        "<s><|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": (
        "<s>[INST] Be brief.\n\nhello [/INST] world</s>[INST] the fox [/INST]",
        "<s>[INST] hello [/INST]",
    ),
}


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return merging_scene(tmp_path)


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def files_of(folder: Path) -> SideFiles:
    return SideFiles(folder)


# ---------------------------------------------------------------------------------------------- the known templates


def test_every_known_template_is_rendered_here():
    assert known_templates() == sorted(RENDERED)


@pytest.mark.parametrize("name", RENDERED)
def test_known_templates(scene: Scene, name: str):
    """As the tokenizer of a merge renders them; the old template in tokenizer_config.json is gone."""
    base, one = (make_model(scene.folder / who, "bpe") for who in ("base", "one"))
    change_json(base / "tokenizer_config.json", chat_template="old")
    said = scene.merge(base, [one], "--chat_template", name).err
    assert f"note: the chat template is {name}." in said
    tokenizer = tokenizer_of(scene.out)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == RENDERED[name][0]
    assert tokenizer.apply_chat_template(CHAT[1:2], tokenize=False, add_generation_prompt=True) == RENDERED[name][1]
    tokenizer.bos_token = tokenizer.eos_token = None
    plain = [text.replace("<s>", "").replace("</s>", "") for text in RENDERED[name]]
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == plain[0]
    assert "chat_template" not in scene.json("tokenizer_config.json")
    assert (scene.out / "chat_template.jinja").read_text() == read_template(name)
    assert scene.json("merge_recipe.json")["chat_template"] == name
    assert f"chat_template `{name}`" in (scene.out / "README.md").read_text()


def test_markers_that_are_no_tokens_are_noted(scene: Scene):
    base = make_model(scene.folder / "base", "bpe")
    one = make_model(scene.folder / "one", "bpe", ["<|im_start|>"])
    said = scene.merge(base, [one], "--chat_template", "chatml").err
    assert "the chat template writes '<|im_end|>', which the output's tokenizer does not have as tokens" in said
    assert "does not have" not in scene.merge(base, [one], "--chat_template", "alpaca").err


def test_markers():
    template = "{# <|no|> #}<|a|>{{ '<|b|>' }}[|c|]{{ x[1] }}<|a|>{{ '<|' + role + '|>' }}"
    assert foreign_markers(template, {"<|b|>"}) == ["<|a|>", "[|c|]"]


# ----------------------------------------------------------------------------------------------- what a user can give


def test_a_file_and_a_template_itself(scene: Scene):
    base, one = (make_model(scene.folder / who, "bpe") for who in ("base", "one"))
    mine = scene.folder / "mine.jinja"
    mine.write_text("{{ messages | length }} mine")
    for given, text in ((str(mine), "1 mine"), ("{{ messages | length }} é", "1 é")):
        scene.merge(base, [one], "--chat_template", given)
        assert tokenizer_of(scene.out).apply_chat_template(CHAT[:1], tokenize=False) == text
        assert scene.json("merge_recipe.json")["chat_template"] == given
    assert "chat_template `one that is written out`" in (scene.out / "README.md").read_text()


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        ("chatlm", 2, "unknown template 'chatlm'. Did you mean 'chatml'?"),
        ("", 2, "unknown template ''"),
        ("{{ messages", 1, "--chat_template one that is written out: expected a Jinja template, got an error: line 1:"),
        ("{% if %}", 1, "expected a Jinja template"),
    ],
)
def test_templates_that_are_refused(scene: Scene, given: str, code: int, says: str):
    base, one = (make_model(scene.folder / who, "bpe") for who in ("base", "one"))
    assert says in scene.merge(base, [one], "--chat_template", given, code=code).err
    assert not scene.out.exists()


def test_a_file_that_is_no_text(tmp_path: Path):
    (tmp_path / "t.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="expected a text file"):
        read_template(str(tmp_path / "t.jinja"))


def test_auto_takes_the_template_that_most_inputs_have(scene: Scene):
    base = make_model(scene.folder / "base", "bpe")
    models = [make_model(scene.folder / who, "bpe") for who in ("one", "two", "three")]
    said = scene.merge(base, models, "--chat_template", "auto").err
    assert "note: no input has a chat template, and so the output has none." in said
    assert not (scene.out / "chat_template.jinja").exists()
    (base / "chat_template.jinja").write_text("base")
    change_json(models[0] / "tokenizer_config.json", chat_template="one")
    assert f"is that of {base}, which 1 of 4 inputs have." in scene.merge(base, models, "--chat_template", "auto").err
    assert (scene.out / "chat_template.jinja").read_text() == "base"
    several = [{"name": "default", "template": "one\n"}, {"name": "tool_use", "template": "tools"}]
    change_json(models[1] / "tokenizer_config.json", chat_template=several)
    (models[0] / "tokenizer_config.json").unlink()
    shutil.copy(models[1] / "tokenizer_config.json", models[0])
    said = scene.merge(base, models, "--chat_template", "auto").err
    assert f"is that of {models[0]}, which 2 of 4 inputs have." in said
    assert tokenizer_of(scene.out).chat_template == {"default": "one\n", "tool_use": "tools"}


def test_where_templates_are_found(tmp_path: Path):
    """In the order of transformers; all of them give way to new ones."""
    assert templates_of(files_of(tmp_path)) == {}
    write_json(tmp_path / "processor_config.json", {"chat_template": "P", "x": 1})
    assert templates_of(files_of(tmp_path)) == {"default": "P"}
    write_json(tmp_path / "chat_template.json", {"chat_template": "J"})
    assert templates_of(files_of(tmp_path)) == {"default": "J"}
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": "C", "y": 2})
    assert templates_of(files_of(tmp_path)) == {"default": "C"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/rag.jinja").write_text("R")
    (tmp_path / "chat_template.jinja").write_text("F")
    files = files_of(tmp_path)
    assert templates_of(files) == {"default": "F", "rag": "R"}
    set_templates(files, {"default": "N", "tool_use": "T"})
    assert templates_of(files) == {"default": "N", "tool_use": "T"}
    assert files.names == [
        "additional_chat_templates/tool_use.jinja",
        *("chat_template.jinja", "processor_config.json", "tokenizer_config.json"),
    ]
    assert (files.read_json("processor_config.json"), files.read_json("tokenizer_config.json")) == ({"x": 1}, {"y": 2})


# -------------------------------------------------------------------------------------------------------- recipe files


def test_a_recipe_file_names_template_and_tokenizer(scene: Scene):
    base, one, chat = (make_model(scene.folder / who, "bpe") for who in ("base", "one", "chat"))
    change_json(chat / "tokenizer_config.json", model_max_length=77)
    recipe = {"merge_method": "linear", "models": [{"model": str(base)}, {"model": str(one)}]}
    path = scene.folder / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe | {"chat_template": "chatml", "copy_tokenizer_from": str(chat)}))
    run = ["--save_path", str(scene.out), "--report", "none", "--quiet"]
    call(merge, "--config", str(path), *run)
    assert tokenizer_of(scene.out).apply_chat_template(CHAT, tokenize=False) == RENDERED["chatml"][0]
    assert scene.json("tokenizer_config.json")["model_max_length"] == 77
    again = scene.folder / "again"
    recorded = ["--config", str(scene.out / "merge_recipe.json"), "--save_path", str(again), *run[2:]]
    call(merge, *recorded)
    for name in ("chat_template.jinja", "tokenizer_config.json", "tokenizer.json", "model.safetensors"):
        assert (again / name).read_bytes() == (scene.out / name).read_bytes()
    call(merge, "--config", str(path), "--chat_template", "alpaca", *run, code=2)
    path.write_text(yaml.safe_dump(recipe | {"chat_template": 3}))
    call(merge, "--config", str(path), *run, code=2)


def test_flags_become_keys_of_a_recipe_file(tmp_path: Path):
    models = ["--method", "linear", "--base_model", "./base", "--models_to_merge", "./one"]
    chosen = {"chat_template": "llama3", "copy_tokenizer_from": "org/chat"}
    flags = [part for key, value in chosen.items() for part in (f"--{key}", value)]
    call(merge, *models, *flags, "--write_config", str(tmp_path / "recipe.yml"))
    assert chosen.items() <= yaml.safe_load((tmp_path / "recipe.yml").read_text()).items()


# ------------------------------------------------------------------------------------------------- another's tokenizer


def test_the_tokenizer_files_of_another_model(scene: Scene):
    """All of them; the numbers, the config and the generation config stay."""
    base, one, chat = (make_model(scene.folder / who, "bpe", ["[PAD]"]) for who in ("base", "one", "chat"))
    change_json(chat / "tokenizer_config.json", chat_template="{{ messages }}", pad_token="[PAD]")
    change_json(chat / "generation_config.json", temperature=0.1)
    write_json(base / "special_tokens_map.json", {})
    said = scene.merge(base, [one], "--copy_tokenizer_from", str(chat)).err
    assert f"note: the tokenizer files are those of {chat}." in said
    tokenizer = check_rows(scene.out, lambda token: "base", 291)
    assert (tokenizer.pad_token, tokenizer.chat_template) == ("[PAD]", "{{ messages }}")
    assert (scene.out / "tokenizer_config.json").read_bytes() == (chat / "tokenizer_config.json").read_bytes()
    assert (scene.out / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert not (scene.out / "special_tokens_map.json").exists()
    assert f"copy_tokenizer_from `{chat}`" in (scene.out / "README.md").read_text()


def test_a_tokenizer_with_other_ids_is_refused(scene: Scene):
    base, one = (make_model(scene.folder / who, "bpe", ["[PAD]", "<|x|>"]) for who in ("base", "one"))
    chat = make_model(scene.folder / "chat", "bpe", ["<|x|>", "<|y|>", "[PAD]"])
    said = scene.merge(base, [one], "--copy_tokenizer_from", str(chat), code=1).err
    assert f"--copy_tokenizer_from {chat}: 3 of its 293 tokens have another id in the output, or none: " in said
    assert "'<|x|>' has 290, and 291 there" in said
    plain = make_model(scene.folder / "plain", "bpe")
    assert (
        "; 2 tokens that have rows are not in it." in scene.merge(base, [one], "--copy_tokenizer_from", str(plain)).err
    )


def test_a_tokenizer_for_models_without_one(scene: Scene):
    base, one, chat, large = (make_model(scene.folder / who, "bpe") for who in ("base", "one", "chat", "large"))
    more = make_model(scene.folder / "more", "bpe", ["[PAD]"])
    for folder in (base, one):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
    scene.merge(base, [one], "--copy_tokenizer_from", str(chat))
    assert len(tokenizer_of(scene.out)) == 290
    assert (
        "its ids go up to 290, and the output has 290 rows"
        in scene.merge(base, [one], "--copy_tokenizer_from", str(more), code=1).err
    )
    (large / "tokenizer.json").unlink()
    assert "has no tokenizer files" in scene.merge(base, [one], "--copy_tokenizer_from", str(large), code=1).err
    assert "no such folder" in scene.merge(base, [one], "--copy_tokenizer_from", str(scene.folder / "no"), code=1).err
    assert "expected NAME@REVISION" in scene.merge(base, [one], "--copy_tokenizer_from", "@x", code=2).err


def test_a_tokenizer_from_the_hub(scene: Scene, monkeypatch: pytest.MonkeyPatch):
    """Without the weights; and one that changes makes another output."""
    base, one, chat = (make_model(scene.folder / who, "bpe") for who in ("base", "one", "chat"))
    change_json(chat / "tokenizer_config.json", model_max_length=77)
    with FakeHub({"org/chat": chat}) as hub:
        hub.attach(monkeypatch, scene.folder / "cache")
        scene.merge(base, [one], "--copy_tokenizer_from", "org/chat")
        assert not list((scene.folder / "cache").rglob("*.safetensors"))
        assert scene.json("tokenizer_config.json")["model_max_length"] == 77


def test_a_changed_template_is_another_output(scene: Scene):
    base, one = (make_model(scene.folder / who, "bpe") for who in ("base", "one"))
    mine = scene.folder / "mine.jinja"
    mine.write_text("{{ 1 }}")
    flags = ["--method", "linear", "--base_model", str(base), "--models_to_merge", str(one), "--report", "none"]
    flags += ["--chat_template", str(mine), "--save_path", str(scene.out)]
    call(merge, *flags)
    call(merge, *flags)  # finds it complete
    mine.write_text("{{ 2 }}")
    call(merge, *flags, code=2)  # the folder is not empty
    call(merge, *flags, "--overwrite")
    assert (scene.out / "chat_template.jinja").read_text() == "{{ 2 }}"


# --------------------------------------------------------------------------------------------------------- performAIM


def test_perform_aim(scene: Scene):
    base, merged, chat = (make_model(scene.folder / who, "bpe") for who in ("base", "merged", "chat"))
    change_json(chat / "tokenizer_config.json", model_max_length=77)
    relax(base, merged, scene.out, "--chat_template", "mistral", "--copy_tokenizer_from", str(chat))
    tokenizer = tokenizer_of(scene.out)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == RENDERED["mistral"][0]
    assert tokenizer.model_max_length == 77
    recipe = json.loads((scene.out / "merge_recipe.json").read_text())
    assert (recipe["chat_template"], recipe["copy_tokenizer_from"]) == ("mistral", str(chat))
    named = ["--merged_model", str(merged), "--pretrained_model_name", str(base), "--save_path", str(scene.out)]
    assert "Did you mean 'mistral'?" in call(performAIM, *named, "--chat_template", "mistrel", code=2).err


# ------------------------------------------------------------------------------------------------ where a turn ends

CHATML = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>\n{% endfor %}"
TURNS = ["<|im_start|>", "<|im_end|>"]


def make_chats(scene: Scene) -> tuple[Path, list[Path]]:
    """A base that has the tokens of turns and does not end at them, and two chat models with the same tokens that do."""
    base = make_model(scene.folder / "base", "bpe", TURNS)
    models = [make_model(scene.folder / name, "bpe", TURNS) for name in ("one", "two")]
    end = tokenizer_of(base).convert_tokens_to_ids("<|im_end|>")
    write_json(base / "generation_config.json", {"eos_token_id": 2, "do_sample": True})
    for folder in models:
        change_json(folder / "config.json", eos_token_id=end)
        write_json(folder / "generation_config.json", {"eos_token_id": [end, 2]})
        (folder / "chat_template.jinja").write_text(CHATML)
    return base, models


def test_chat_models_with_the_tokens_of_the_base(scene: Scene):
    """The output ends where the models do and has their template; with a note each; what the base says besides stays."""
    base, models = make_chats(scene)
    said = scene.merge(base, models).err
    end = tokenizer_of(base).convert_tokens_to_ids("<|im_end|>")
    assert scene.json("generation_config.json") == {"eos_token_id": [2, end], "do_sample": True}
    assert (scene.out / "chat_template.jinja").read_text() == CHATML
    assert said.count("note: the output's text ends at any of '!', '<|im_end|>'.") == 1
    assert said.count(f"note: the chat template is that of {models[0]}.") == 1
    call(merge, "--verify", str(scene.out))


def test_a_recipe_file_unites_as_flags_do_and_its_record_makes_the_same_files(scene: Scene):
    base, models = make_chats(scene)
    scene.merge(base, models)
    by_flags = scene.json("generation_config.json")
    recipe = {"merge_method": "linear", "base_model": str(base), "models": [{"model": str(one)} for one in models]}
    first, again, kept = (scene.folder / name for name in ("first", "again", "kept"))
    write_json(scene.folder / "recipe.json", recipe)
    write_json(scene.folder / "base.json", recipe | {"tokenizer_source": "base"})
    for config, out in (
        (scene.folder / "recipe.json", first),
        (first / "merge_recipe.json", again),
        (scene.folder / "base.json", kept),
    ):
        assert merge.main(["--config", str(config), "--save_path", str(out), "--quiet"]) == 0
    for folder in (first, again):
        assert json.loads((folder / "generation_config.json").read_text()) == by_flags
        assert (folder / "chat_template.jinja").read_text() == CHATML
    assert (kept / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert not (kept / "chat_template.jinja").exists()


def test_a_user_who_names_the_bases_tokenizer_keeps_its_files(scene: Scene):
    base, models = make_chats(scene)
    said = scene.merge(base, models, "--tokenizer_source", "base").err
    for name in ("config.json", "generation_config.json"):
        assert (scene.out / name).read_bytes() == (base / name).read_bytes()
    assert not (scene.out / "chat_template.jinja").exists()
    assert "note: the" not in said


def test_models_that_end_as_the_base_leave_its_files_as_they_are(scene: Scene):
    base, models = make_chats(scene)
    for folder in (base, models[0]):
        shutil.copy(models[1] / "generation_config.json", folder)
        (folder / "chat_template.jinja").write_text(CHATML)
    said = scene.merge(base, models).err
    for name in ("config.json", "generation_config.json", "chat_template.jinja"):
        assert (scene.out / name).read_bytes() == (base / name).read_bytes()
    assert "note: the" not in said


def test_a_named_template_is_not_replaced(scene: Scene):
    base, models = make_chats(scene)
    said = scene.merge(base, models, "--chat_template", "chatml").err
    assert "the chat template is chatml." in said
    assert f"the chat template is that of {models[0]}" not in said
    assert "ends at any of" in said


def test_verifying_a_template_whose_turns_do_not_end(scene: Scene):
    base, models = make_chats(scene)
    scene.merge(base, models, "--tokenizer_source", "base", "--chat_template", "chatml")
    said = call(merge, "--verify", scene.out, code=1).err
    assert (
        f"{scene.out}: its chat template ends a turn with '<|im_end|>', and eos_token_id lists '!' only: the model will not stop. Add the "
        "token's id to eos_token_id in generation_config.json." in said
    )


@pytest.mark.parametrize(
    ("template", "eos_token", "expected"),
    [
        (CHATML, None, ["<|im_end|>"]),
        ("{# ends with <|eot_id|> #}{{ messages }}</s>", None, ["</s>"]),
        ("{{ m['content'] + eos_token }}", "<|im_end|>", ["<|im_end|>"]),
        ("{{ m['content'] }}", "<|im_end|>", []),
        ("<end_of_turn>\n[|endofturn|]<|eot_id|>", None, ["<end_of_turn>", "[|endofturn|]", "<|eot_id|>"]),
        ("<|unknown_end|>", None, []),
    ],
)
def test_what_may_end_a_turn(template: str, eos_token: str | None, expected: list[str]):
    known = {"<|im_end|>", "</s>", "<end_of_turn>", "[|endofturn|]", "<|eot_id|>"}
    assert end_markers(template, eos_token, known) == expected
