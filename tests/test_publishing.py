"""What a published recipe and card say of their inputs: nothing of the machine that they were made on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from checkpoints.publishing import PublicNames, public_name, publish

F = "1a2b3c4d5e6f" + "0" * 52
RECIPE = {
    "schema": 1,
    "merge_method": "ties",
    "base_model": "org/base",
    "models": [{"model": "/home/me/my models/math"}, {"model": "code", "parameters": {"weight": 1}}, {"model": "./a/x+~/lora"}],
    "exclude": "/home/x|</s>",
    "chat_template": "{{ '</s>/a/b/c' }}",
    "inputs": [
        {"model": "org/base", "folder": "/home/me/.cache/hub/s", "revision": "c0ffee", "fingerprint": F, "files": {"a": {"bytes": 1}}},
        {"model": "/home/me/my models/math", "folder": "/mnt/big/math", "fingerprint": F, "files": {"a": {"bytes": 1, "mtime_ns": 5}}},
        {"model": "code", "folder": "/home/me/code", "fingerprint": F},
        {"model": "./a/x+~/lora", "folder": "/home/me/a/x", "fingerprint": F, "adapters": [{"folder": "/home/me/lora"}]},
    ],
    "notes": ["/home/me/my models/math: is odd, as /mnt/big/math and https://arxiv.org/abs/2502.02421 say.", "see /var/lib/data/x.txt."],
    "aim": {"calibration": {"source": "/home/me/private text.jsonl", "text_field": "text"}, "omega": 0.4},
    "command": [
        "python", "merge.py", "--models_to_merge", "/home/me/my models/math:0.5,code:1,./a/x+~/lora", "--save_path=/home/me/out",
        "--config", "../r.yml", "--weights", "-1,0.5", "--base_model", "org/base",
    ],
    "merged_recipe": {"inputs": [{"model": "/home/you/old", "folder": "/home/you/old", "fingerprint": "9" * 64}], "base_model": "/home/you/old"},
    "digests": {"README.md": {"bytes": 1, "sha256": "x"}},
}  # fmt: skip
MATH, CODE, LORA = (
    "math (fingerprint 1a2b3c4d5e6f)",
    "code (fingerprint 1a2b3c4d5e6f)",
    "x+lora (fingerprint 1a2b3c4d5e6f)",
)


def test_a_recipe_with_public_names():
    public = PublicNames(RECIPE).of_recipe(RECIPE)
    assert public["base_model"] == "org/base@c0ffee"
    assert [one["model"] for one in public["models"]] == [MATH, CODE, LORA]
    assert [sorted(one) for one in public["inputs"]] == [
        ["files", "fingerprint", "model", "revision"], ["files", "fingerprint", "model"], ["fingerprint", "model"],
        ["adapters", "fingerprint", "model"],
    ]  # fmt: skip
    assert public["notes"] == [f"{MATH}: is odd, as {MATH} and https://arxiv.org/abs/2502.02421 say.", "see x.txt."]
    assert public["aim"] == {"calibration": {"source": "private text.jsonl", "text_field": "text"}, "omega": 0.4}
    assert public["command"] == [
        "python", "merge.py", "--models_to_merge", f"{MATH}:0.5,{CODE}:1,{LORA}", "--save_path=out", "--config", "r.yml",
        "--weights", "-1,0.5", "--base_model", "org/base@c0ffee",
    ]  # fmt: skip
    assert public["merged_recipe"]["base_model"] == "old (fingerprint 999999999999)"
    assert (public["exclude"], public["chat_template"]) == (RECIPE["exclude"], RECIPE["chat_template"])
    assert not any(
        word in json.dumps(public).replace("/home/x", "") for word in ("/home", "/mnt", "~/", "mtime", "my models")
    )
    assert PublicNames(public).of_recipe(public) == public


@pytest.mark.parametrize(
    ("model", "revisions", "public"),
    [
        ("org/m", ["c"], "org/m@c"),
        ("org/m@main", ["c"], "org/m@c"),
        ("/x/m/", [None], MATH.replace("math", "m")),
        ("org/m+/x/l", ["c", None], "org/m@c+l (fingerprint 1a2b3c4d5e6f)"),
        ("org/l", ["b", "c"], "org/l@c"),
        ("/", [None], "folder (fingerprint 1a2b3c4d5e6f)"),
    ],
)
def test_names(model, revisions, public):
    assert public_name(model, revisions, F) == public


def test_a_checkpoint_is_published_once(tmp_path: Path):
    (tmp_path / "merge_recipe.json").write_text(json.dumps(RECIPE))
    (tmp_path / "README.md").write_text(
        "# out\n\n- `/home/me/my models/math`\n\n```sh\npython merge.py --x '/mnt/big/math'\n```\n"
    )
    assert publish(tmp_path)
    card = (tmp_path / "README.md").read_bytes()
    assert card.decode() == f"# out\n\n- `{MATH}`\n\n```sh\npython merge.py --x '{MATH}'\n```\n"
    recipe = (tmp_path / "merge_recipe.json").read_bytes()
    entry = json.loads(recipe)["digests"]["README.md"]
    assert entry == {"bytes": len(card), "sha256": hashlib.sha256(card).hexdigest()}
    assert not publish(tmp_path)
    assert ((tmp_path / "README.md").read_bytes(), (tmp_path / "merge_recipe.json").read_bytes()) == (card, recipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "merge_recipe.json"]


def test_a_folder_without_a_recipe_is_left_alone(tmp_path: Path):
    (tmp_path / "README.md").write_text("/home/me/x")
    assert not publish(tmp_path)
    assert (tmp_path / "README.md").read_text() == "/home/me/x"
