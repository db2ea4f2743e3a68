"""Configs that have models of equal shapes compute otherwise: refused, warned of, noted, or the same in another spelling."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import merge
import performAIM
from alignment.configs import check_configs
from checkpoints.model import Model, close_all, open_model
from checkpoints.problems import Problems
from tests.adapter_files import make_adapter
from tests.aim_runs import write_texts
from tests.pico import Family, make_family
from tests.scene import call

ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("configs"), "llama", n_models=2)


def with_config(source: Path, target: Path, **entries: Any) -> Path:
    """A copy of a model with other entries in its config.json; None takes one out."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | entries
    (target / "config.json").write_text(json.dumps({key: one for key, one in config.items() if one is not None}))
    return target


def compare(*folders: Path, allowed: str | None = None) -> Problems:
    models: list[Model] = [open_model(str(folder)) for folder in folders]
    problems = Problems()
    check_configs(models, allowed, problems)
    close_all(models)
    return problems


# Name -> entries of the base's config, and of a model's, that mean the same.
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rope as transformers 4 and 5 spell it": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_parameters": None, "rope_theta": 500000, "rope_scaling": None},
    ),
    "scaled rope": (
        {"rope_parameters": ROPE | {"rope_theta": 500000.0}},
        {"rope_parameters": None, "rope_theta": 500000.0, "rope_scaling": ROPE},
    ),
    "the default left out": ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, {"rope_parameters": None}),
    "names of one activation": ({"hidden_act": "silu"}, {"hidden_act": "swish"}),
    "a width that follows": ({"head_dim": 8}, {"head_dim": None}),
    "what computes nothing": (
        {"torch_dtype": "float16", "transformers_version": "4.30.0", "pretraining_tp": 2},
        {"initializer_range": 0.5, "attention_dropout": 0.1, "use_cache": False, "eos_token_id": 7, "unsloth_version": "2024.9"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_configs_that_mean_the_same(family: Family, tmp_path: Path, name: str):
    ours, theirs = SAME[name]
    base, one = (
        with_config(family.base, tmp_path / "base", **ours),
        with_config(family.models[0], tmp_path / "one", **theirs),
    )
    found = compare(base, one)
    assert (list(found), found.warnings, found.notes) == ([], [], [])


# Name -> entries of a model's config, and what is warned of.
OTHERWISE: dict[str, tuple[dict[str, Any], str]] = {
    "rope": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_parameters.rope_theta 1000000.0 (10000.0 in BASE)"),
    "rope in the old spelling": ({"rope_parameters": None, "rope_theta": 1e6}, "rope_parameters.rope_theta 1000000.0 (10000.0 in BASE)"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act gelu (silu in BASE)"),
    "epsilon": ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05 (1e-06 in BASE)"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_model_that_computes_otherwise_is_warned_of(family: Family, tmp_path: Path, name: str):
    entries, says = OTHERWISE[name]
    one = with_config(family.models[0], tmp_path / "one", **entries)
    found = compare(family.base, family.models[1], one)
    assert not found
    assert found.warnings == [
        f"{one}: its config.json has {says.replace('BASE', str(family.base))}: it computes otherwise than with the config of {family.base}, "
        "which the output gets."
    ]


def test_models_that_agree_against_the_base(family: Family, tmp_path: Path):
    models = [with_config(one, tmp_path / one.name, rope_parameters=None, rope_theta=5e4) for one in family.models]
    last = compare(family.base, *models).warnings[-1]
    assert last == (
        f"all models have rope_parameters.rope_theta 50000.0, and {family.base} has not: it is probably not the base that they were "
        f"fine-tuned from. Name that one. To keep this one with their config, copy the config.json of {models[0]} over that in the output."
    )
    assert len(compare(family.base, models[0], family.models[1]).warnings) == 1


def test_other_heads_of_the_same_shapes(family: Family, tmp_path: Path):
    """Refused in both commands; the flag that the message names lets it through, with a note, and is in the recipe."""
    one = with_config(family.models[0], tmp_path / "one", num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    flags = [
        "--method=task_arithmetic",
        "--base_model",
        family.base,
        "--models_to_merge",
        one,
        "--save_path",
        tmp_path / "out",
    ]
    argv = list(map(str, flags))
    ended = call(merge, *argv, code=1)
    said = ended.err
    assert (
        f"{one}: config.json: expected the heads of {family.base}, got num_attention_heads 8 (4 in {family.base}), num_key_value_heads 4 (2 in"
        in said
    )
    allow = "--allow_config_difference num_attention_heads,num_key_value_heads,head_dim"
    assert f"or let it through with {allow}." in said
    ended = call(merge, *argv, *allow.split())
    assert f"note: {one}: config.json has num_attention_heads 8 (4 in {family.base}), which was allowed" in ended.err
    recipe = json.loads((tmp_path / "out" / "merge_recipe.json").read_text())
    assert recipe["allow_config_difference"] == allow.split()[1]
    relaxing = ["--pretrained_model_name", family.base, "--merged_model", one, "--save_path", tmp_path / "aim"]
    relaxing += ["--calibration_data", write_texts(tmp_path), "--n_samples=4", "--block_size=64"]
    argv = list(map(str, relaxing))
    ended = call(performAIM, *argv, code=1)
    assert f"or let it through with {allow}." in ended.err
    call(performAIM, *argv, *allow.split())


def test_lengths_are_noted_and_the_largest_named(family: Family, tmp_path: Path):
    one = with_config(family.models[0], tmp_path / "one", max_position_embeddings=4096)
    two = with_config(family.models[1], tmp_path / "two", max_position_embeddings=256)
    found = compare(family.base, one, two)
    assert (list(found), found.warnings) == ([], [])
    assert found.notes == [
        f"{one}: config.json has max_position_embeddings 4096 (512 in {family.base}); the output has that of {family.base}.",
        f"{two}: config.json has max_position_embeddings 256 (512 in {family.base}); the output has that of {family.base}.",
        f"the largest max_position_embeddings is 4,096, that of {one}; the output's config.json can be given it.",
    ]


def test_an_adapter_on_another_base(family: Family, tmp_path: Path):
    """The adapted model's config is that of its own base."""
    other = with_config(family.base, tmp_path / "other", rms_norm_eps=1e-4)
    adapter = make_adapter(tmp_path / "lora", other, r=2, target_modules=["q_proj"])
    models = [open_model(str(family.base)), open_model(f"{other}+{adapter}")]
    problems = Problems()
    check_configs(models, None, problems)
    close_all(models)
    assert (
        f"{other}+{adapter}: its config.json has rms_norm_eps 0.0001 (1e-06 in {family.base})" in problems.warnings[0]
    )


def test_windows_soft_caps_and_experts(tmp_path: Path):
    """Each by the name that its class has for it."""
    gemma = make_family(tmp_path / "gemma", "gemma2", n_models=1)
    one = with_config(
        gemma.models[0], tmp_path / "one", sliding_window=32, attn_logit_softcapping=None, final_logit_softcapping=10.0
    )
    said = compare(gemma.base, one).warnings[0]
    assert "sliding_window 32 (64 in" in said
    assert "final_logit_softcapping 10.0 (30.0 in" in said
    experts = make_family(tmp_path / "experts", "mixtral", n_models=1)
    two = with_config(experts.models[0], tmp_path / "two", num_experts_per_tok=1)
    assert "num_experts_per_tok 1 (2 in" in compare(experts.base, two).warnings[0]


def test_a_class_that_is_not_known_is_compared_as_it_is_written(family: Family, tmp_path: Path):
    base = with_config(family.base, tmp_path / "base", model_type="unheard_of", rope_parameters=None, rope_theta=1e4)
    one = with_config(
        family.models[0],
        tmp_path / "one",
        model_type="unheard_of",
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    two = with_config(family.models[1], tmp_path / "two", model_type="unheard_of", rms_norm_eps=0.1)
    found = compare(base, one, two)
    assert [warning.split(": ")[0] for warning in found.warnings] == [str(two)]
