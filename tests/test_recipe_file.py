"""Recipe files: what they mean, what they refuse, and that what is written reads back the same."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import merge
from checkpoints.errors import InputError
from merging.layers import find_layers, position
from merging.recipe_file import read_recipe_file
from merging.safe_yaml import MAX_BYTES
from streaming.values import NOTHING, Value
from tests.golden_files import assert_same_bits
from tests.pico import make_family
from tests.scene import Scene, call

INPUTS = Path(__file__).parent / "goldens" / "inputs"
MODELS = [{"model": "in/math", "parameters": {"weight": 0.5}}, {"model": "in/code", "parameters": {"weight": 0.3}}]
TIES = {"merge_method": "ties", "base_model": "in/base", "models": MODELS}

MergeRecipe = Callable[..., dict[str, Tensor]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where `in` holds the models."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").symlink_to(INPUTS)
    return tmp_path


@pytest.fixture
def scene(here: Path) -> Scene:
    """merge.py with the recipe that `write` wrote."""
    return Scene(here, merge, {"--config": "recipe.yml", "--save_path": "out"})


@pytest.fixture
def merge_recipe(scene: Scene) -> MergeRecipe:
    """A recipe given as data or text -> the tensors of its merge."""

    def merge_recipe(recipe: Any, *flags: str, save_path: str = "out") -> dict[str, Tensor]:
        write(recipe)
        scene.run("--overwrite", f"--save_path={save_path}", *flags)
        return scene.tensors(save_path)

    return merge_recipe


def write(recipe: Any, path: str = "recipe.yml") -> None:
    Path(path).write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, sort_keys=False))


def refusal(recipe: Any, **flags: Any) -> str:
    """The message that a recipe is refused with; exit code 2."""
    write(recipe)
    with pytest.raises(InputError) as error:
        read_recipe_file("recipe.yml", **flags)
    assert error.value.exit_code == 2
    return str(error.value)


def inputs(*names: str) -> list[dict[str, Tensor]]:
    return [load_file(INPUTS / name / "model.safetensors") for name in names]


# ----------------------------------------------------------------------------------------------------------- values


def test_a_gradient_is_interpolated_and_yes_and_no_step():
    value = Value(((None, (0.0, 0.3, 0.9)),))
    assert [value.at("w", t) for t in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx([0, 0.15, 0.3, 0.6, 0.9])
    assert [Value(((None, (True, False)),)).at("w", t) for t in (0.0, 0.5, 1.0)] == [True, True, False]
    assert Value.constant(2).at("w", 0.3) == 2


def test_the_first_filter_in_the_name_counts():
    value = Value((("mlp", (0.1,)), ("down", (0.2,)), (None, (0.0, 1.0)), ("norm", (5.0,))))
    assert value.at("layers.0.mlp.down_proj", 0.5) == 0.1
    assert value.at("layers.0.down", 0.5) == 0.2
    assert value.at("layers.0.norm", 0.5) == 0.5
    assert Value((("mlp", (1,)),)).at("norm", 0.0) is NOTHING


def test_layers_are_found_by_the_first_number_in_the_names():
    names = ["h.0.a", "h.1.a", "h.2.mlp.0.w", "enc.0.a", "enc.1.a", "gap.1.a", "gap.2.a", "embed", "x.y"]
    layers = find_layers(names)
    assert layers.counts == {"h.": 3, "enc.": 2}
    assert [layers.position(name) for name in names] == [0.0, 0.5, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert position(0, 1) == 1.0


def test_parameters_by_layer_and_name(merge_recipe: MergeRecipe):
    """mergekit's example of ties: gradients, filters, the base among the models."""
    merged = merge_recipe(
        """
models:
  - model: in/base
  - model: in/math
    parameters: {weight: [1, 0.5]}
  - model: in/code
    parameters:
      weight:
        - {filter: mlp, value: [0.25, 0.75]}
        - {filter: norm, value: 0}
        - {value: 2}
merge_method: task_arithmetic
base_model: in/base
parameters: {lambda: [{filter: lm_head, value: 3}, {value: 1}], normalize: false}
out_dtype: float32
"""
    )
    base, math, code = inputs("base", "math", "code")

    def expected(name: str, first: float, second: float, lambda_: float = 1.0) -> Tensor:
        b = base[name].float()
        return b + lambda_ * (first * (math[name].float() - b) + second * (code[name].float() - b))

    for name, weights in {
        "model.embed_tokens.weight": (1, 2),
        "lm_head.weight": (1, 2, 3),
        "model.norm.weight": (1, 0),
        "model.layers.0.mlp.up_proj.weight": (1, 0.25),
        "model.layers.1.mlp.up_proj.weight": (0.5, 0.75),
        "model.layers.0.self_attn.q_proj.weight": (1, 2),
        "model.layers.1.self_attn.q_proj.weight": (0.5, 2),
        "model.layers.1.input_layernorm.weight": (0.5, 0),
    }.items():
        torch.testing.assert_close(merged[name], expected(name, *weights), rtol=1e-6, atol=1e-6, msg=name)


def test_a_value_is_looked_for_in_source_slice_and_recipe(here: Path):
    def sources(*parameters: dict[str, Any]) -> list[dict[str, Any]]:
        names = ("in/math", "in/code")
        return [
            {"model": name, "layer_range": [0, 1], "parameters": one}
            for name, one in zip(names, parameters, strict=True)
        ]

    write(
        {
            "merge_method": "ties",
            "base_model": "in/base",
            "slices": [
                {"sources": sources({"weight": 0.1, "density": [{"filter": "mlp", "value": 0.2}]}, {})},
                {"sources": sources({}, {"weight": 0.4}), "parameters": {"weight": 0.3, "lambda": 2.0}},
            ],
            "parameters": {"weight": 0.5, "density": 0.6, "lambda": 0.7},
        }
    )
    recipe = read_recipe_file("recipe.yml")
    first, mlp, second = (vars(recipe.method(name, part=part)) for name, part in (("norm", 0), ("mlp", 0), ("mlp", 1)))
    assert (first["weights"], first["densities"], first["lambda_"]) == ((0.1, 0.5), (0.6, 0.6), 0.7)
    assert (mlp["weights"], mlp["densities"]) == ((0.1, 0.5), (0.2, 0.6))
    assert (second["weights"], second["densities"], second["lambda_"]) == ((0.3, 0.4), (0.6, 0.6), 2.0)


def test_defaults_are_those_of_files_and_are_written_out(here: Path):
    write({**TIES, "models": [{"model": "in/math"}]})
    method = vars(read_recipe_file("recipe.yml").method("w"))
    assert method == {"weights": (1.0,), "densities": (1.0,), "lambda_": 1.0, "normalize": True, "rescale": None}
    stated = read_recipe_file("recipe.yml").as_json()
    assert stated["models"] == [{"model": "in/math", "parameters": {"weight": 1.0, "density": 1.0}}]
    assert stated["parameters"] == {"lambda": 1.0, "normalize": True}


def test_numbers_as_yaml_spells_them(here: Path):
    write("merge_method: karcher\nmodels: [{model: in/math}]\nparameters: {tol: 1e-3, max_iter: 3.0}")
    assert vars(read_recipe_file("recipe.yml").method("w")) == {"max_iter": 3, "tol": 1e-3}
    write({**TIES, "parameters": {"rescale": "l1", "normalize": 0}})
    method = vars(read_recipe_file("recipe.yml").method("w"))
    assert (method["rescale"], method["normalize"]) == (True, False)


# ------------------------------------------------------------------------------------------------- models and methods


@pytest.mark.parametrize("order", [["in/base", "in/math"], ["in/math", "in/base"], ["in/math"]])
def test_slerp_knows_its_base_wherever_it_is_listed(merge_recipe: MergeRecipe, order: list[str]):
    recipe = {"merge_method": "slerp", "base_model": "in/base", "parameters": {"t": 0.0}}
    merged = merge_recipe({**recipe, "models": [{"model": name} for name in order]})
    assert all(torch.equal(merged[name], tensor) for name, tensor in inputs("base")[0].items())


def test_the_base_among_the_models_counts_where_a_method_has_no_use_for_a_base(merge_recipe: MergeRecipe):
    models = [{"model": name, "parameters": {"weight": weight}} for name, weight in (("in/base", 1), ("in/math", 3))]
    merged = merge_recipe({"merge_method": "linear", "base_model": "in/base", "models": models, "out_dtype": "float32"})
    base, math = inputs("base", "math")
    name = "model.norm.weight"
    torch.testing.assert_close(merged[name], (base[name].float() + 3 * math[name].float()) / 4)


def test_without_a_base_the_first_model_gives_what_is_no_number(merge_recipe: MergeRecipe, here: Path):
    shutil.copytree(INPUTS / "math", here / "first")
    config = json.loads((here / "first" / "config.json").read_text())
    (here / "first" / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    merge_recipe({"merge_method": "karcher", "models": [{"model": "first"}, {"model": "in/code"}]})
    assert json.loads(Path("out/config.json").read_text())["rope_theta"] == 5.0
    content = json.loads(Path("out/merge_recipe.json").read_text())
    assert (content["base_model"], content["report"]) == (None, None)
    assert [warning.split(" (")[0] for warning in content["warnings"]] == [
        "in/code: its config.json has rope_parameters.rope_theta 10000.0"
    ]
    assert [entry["model"] for entry in content["inputs"]] == ["first", "in/code"]
    assert "fine-tuned from" not in Path("out/README.md").read_text()


@pytest.mark.parametrize("method", ["ties", "slerp", "model_stock", "sce", "dare_linear"])
def test_methods_that_need_a_base_say_so(here: Path, method: str):
    message = refusal({"merge_method": method, "models": MODELS, "parameters": {"t": 1}})
    assert f"recipe.yml: base_model: {method} needs one" in message


def test_slices_as_newer_versions_wrap_them(merge_recipe: MergeRecipe, scene: Scene):
    """What mergekit itself writes into model cards."""
    recipe = slerp_slices([0, 2], [0, 2], dtype="float32", tokenizer={"source": "base"}, name="mine")
    wrapped = {**recipe, "parameters": {"t": 0.5}}
    wrapped["modules"] = {"default": {"slices": wrapped.pop("slices"), "parameters": {"t": 0.25}}}
    plain = merge_recipe({**recipe, "parameters": {"t": 0.25}}, save_path="plain")
    write(wrapped)
    ended = scene.run("--overwrite")
    for name, tensor in scene.tensors().items():
        assert_same_bits(tensor, plain[name])
    assert "note: name has no effect" in ended.err


def test_models_spelt_out(here: Path):
    write(
        {
            **TIES,
            "models": [{"model": {"model": {"path": "org/name", "revision": "main"}}}, {"model": {"path": "in/code"}}],
        }
    )
    assert [str(one.name) for one in read_recipe_file("recipe.yml").models] == ["org/name@main", "in/code"]


# ------------------------------------------------------------------------------------------------------------ slices


def stack(*sources: tuple[str, int, int], **more: Any) -> dict[str, Any]:
    slices = [{"sources": [{"model": f"in/{name}", "layer_range": [first, end]}]} for name, first, end in sources]
    return {"merge_method": "passthrough", "slices": slices, **more}


def layer(name: str, index: int) -> str:
    return f"model.layers.{index}.{name}.weight"


def test_layers_are_stacked(merge_recipe: MergeRecipe, here: Path):
    merged = merge_recipe(stack(("math", 0, 2), ("code", 1, 2), ("instruct", 0, 2)))
    math, code, instruct = inputs("math", "code", "instruct")
    kinds = {name.split(".", 3)[3] for name in math if "layers" in name}
    origins = [(math, 0), (math, 1), (code, 1), (instruct, 0), (instruct, 1)]
    expected = {
        f"model.layers.{index}.{kind}": model[f"model.layers.{own}.{kind}"]
        for index, (model, own) in enumerate(origins)
        for kind in kinds
    }
    expected |= {name: math[name] for name in ("model.embed_tokens.weight",)}
    expected |= {name: instruct[name] for name in ("model.norm.weight", "lm_head.weight")}
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same_bits(merged[name], tensor, where=name)
    config = json.loads(Path("out/config.json").read_text())
    assert config == {**json.loads((INPUTS / "math/config.json").read_text()), "num_hidden_layers": 5}
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert not any(report.values())
    assert len(model.model.layers) == 5


def test_a_stack_of_one_model_needs_no_second(merge_recipe: MergeRecipe):
    merged = merge_recipe(stack(("math", 0, 2), ("math", 0, 2)))
    (math,) = inputs("math")
    for name, tensor in merged.items():
        parts = name.split(".")
        own = name.replace(f"layers.{parts[2]}", f"layers.{int(parts[2]) % 2}") if "layers" in name else name
        assert_same_bits(tensor, math[own], where=name)


def test_scale_by_name_in_one_slice(merge_recipe: MergeRecipe):
    recipe = stack(("math", 0, 2), ("math", 1, 2))
    recipe["slices"][1]["sources"][0]["parameters"] = {"scale": [{"filter": "down_proj", "value": 0.0}, {"value": 1.0}]}
    merged = merge_recipe(recipe)
    (math,) = inputs("math")
    assert not merged[layer("mlp.down_proj", 2)].any()
    assert_same_bits(merged[layer("mlp.up_proj", 2)], math[layer("mlp.up_proj", 1)])
    assert_same_bits(merged[layer("mlp.down_proj", 1)], math[layer("mlp.down_proj", 1)])


def slerp_slices(*layer_ranges: list[int], **more: Any) -> dict[str, Any]:
    sources = [
        {"model": name, "layer_range": layers}
        for name, layers in zip(("in/base", "in/math"), layer_ranges, strict=True)
    ]
    return {"merge_method": "slerp", "base_model": "in/base", "slices": [{"sources": sources}], **more}


def test_slices_of_whole_models_are_the_models(merge_recipe: MergeRecipe, scene: Scene):
    """The way most slerp recipes are written."""
    t = {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": [1, 0]}, {"value": 0.5}]}
    write(slerp_slices([0, 2], [0, 2], parameters=t))
    assert "report" in scene.run().out
    sliced = scene.tensors()
    whole = {"merge_method": "slerp", "base_model": "in/base", "models": [{"model": "in/math"}], "parameters": t}
    for name, tensor in merge_recipe(whole).items():
        assert_same_bits(tensor, sliced[name])
    base, math = inputs("base", "math")
    assert_same_bits(sliced[layer("self_attn.q_proj", 0)], base[layer("self_attn.q_proj", 0)])
    assert_same_bits(sliced[layer("self_attn.q_proj", 1)], math[layer("self_attn.q_proj", 1)])
    assert_same_bits(sliced[layer("mlp.up_proj", 0)], math[layer("mlp.up_proj", 0)])


def test_layers_of_different_places_are_merged(merge_recipe: MergeRecipe):
    recipe = slerp_slices([0, 1], [1, 2], parameters={"t": 0.5}, out_dtype="float32")
    recipe["slices"].append({"sources": [{"model": "in/math", "layer_range": [0, 1]}]})  # one source is taken as it is
    merged = merge_recipe(recipe)
    base, math = inputs("base", "math")
    name = "self_attn.q_proj"
    b, x = base[layer(name, 0)].float().flatten(), math[layer(name, 1)].float().flatten()
    angle = torch.acos(b.dot(x) / (b.norm() * x.norm()))
    expected = (torch.sin(angle / 2) / torch.sin(angle)) * (b + x)
    torch.testing.assert_close(merged[layer(name, 0)].flatten(), expected, rtol=1e-4, atol=1e-6)
    assert_same_bits(merged[layer(name, 1)], math[layer(name, 0)].float())
    assert json.loads(Path("out/config.json").read_text())["num_hidden_layers"] == 2


def test_the_gradient_of_a_slice_runs_over_its_own_layers(merge_recipe: MergeRecipe):
    sources = [{"model": name, "layer_range": [0, 2]} for name in ("in/math", "in/code")]
    parameters = {"weight": [{"filter": "mlp", "value": [0, 1]}, {"value": 1}], "lambda": [1.0, 0.0]}
    slices = [{"sources": sources, "parameters": parameters}] * 2
    merged = merge_recipe(
        {"merge_method": "task_arithmetic", "base_model": "in/base", "slices": slices, "out_dtype": "float32"}
    )
    (base,) = inputs("base")
    for index in (1, 3):  # the last layer of each slice, and the first with weight 0
        assert_same_bits(merged[layer("mlp.up_proj", index)], base[layer("mlp.up_proj", 1)].float())
        assert_same_bits(merged[layer("mlp.up_proj", index - 1)], base[layer("mlp.up_proj", 0)].float())
        assert not torch.equal(merged[layer("self_attn.q_proj", index - 1)], base[layer("self_attn.q_proj", 0)].float())


def test_what_config_says_of_each_layer_follows(merge_recipe: MergeRecipe, here: Path):
    for name, kind in (("math", "sliding"), ("code", "chunked")):
        shutil.copytree(INPUTS / name, here / f"typed_{name}")
        path = here / f"typed_{name}" / "config.json"
        kinds = ["full_attention", f"{kind}_attention"]
        path.write_text(json.dumps({**json.loads(path.read_text()), "layer_types": kinds}))
    sources = [{"model": "typed_math", "layer_range": [0, 2]}], [{"model": "typed_code", "layer_range": [1, 2]}]
    merge_recipe({"merge_method": "passthrough", "slices": [{"sources": one} for one in sources]})
    config = json.loads(Path("out/config.json").read_text())
    assert config["layer_types"] == ["full_attention", "sliding_attention", "chunked_attention"]


def test_a_stack_reads_back(merge_recipe: MergeRecipe):
    merge_recipe(stack(("math", 0, 2), ("code", 1, 2)))
    call(merge, "--config", "out/merge_recipe.json", "--save_path", "again", "--quiet")
    for name in ("model.safetensors", "config.json"):
        assert Path("again", name).read_bytes() == Path("out", name).read_bytes()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (stack(("math", 0, 3)), r"in/math: has 2 layers"),
        (stack(("math", 2, 2)), r"slices\[0\].sources\[0\].layer_range: expected \[FIRST, END\]"),
        (slerp_slices([0, 1], [0, 2], parameters={"t": 1}), "expected as many layers of each model, got 1, 2"),
    ],
)
def test_layers_that_are_not_there(here: Path, recipe: Any, message: str):
    write(recipe)
    err = call(merge, "--config", "recipe.yml", "--save_path", "out", code=2).err
    assert re.search(message, err)
    assert not Path("out").exists()


def test_a_stack_of_models_that_do_not_fit_is_refused_once_for_each_kind(here: Path):
    write(stack(("math", 0, 2), ("f32/code", 0, 1)))
    err = call(merge, "--config", "recipe.yml", "--save_path", "out", code=1).err
    assert "in/f32/code: model.norm.weight: expected shape [64] as in in/math, got [32]" in err
    assert not Path("out").exists()


def test_aim_has_no_base_for_a_stack(here: Path):
    (here / "texts.txt").write_text("Merge two.\n" * 90)
    recipe = stack(("math", 0, 2), ("math", 0, 1), base_model="in/base")
    write({**recipe, "aim": {"omega": 0.4, "calibration": {"source": "texts.txt", "block_size": 32}}})
    err = call(merge, "--config", "recipe.yml", "--save_path", "out", code=2).err
    assert "stacks layers" in err
    assert not Path("out").exists()


# ------------------------------------------------------------------------------------------------- what is said of it


def test_what_has_no_effect_is_said(scene: Scene):
    models = [{"model": "in/math", "parameters": {"weight": 1, "t": 0.3, "lambda": 2, "int8_mask": True}}]
    write({**TIES, "models": models, "parameters": {"int8_mask": True}, "dtype": "float16", "seed": 3})
    out = scene.run("--dry_run").out
    for note in (
        "note: int8_mask has no effect",
        "note: models[0].parameters.t has no effect: ties does not use it.",
        "note: models[0].parameters.lambda has no effect: it holds for all models.",
        "note: dtype float16: the arithmetic is float32 in any case, and float16 is written.",
        "note: seed has no effect",
    ):
        assert note in out
    assert out.count("int8_mask") == 1


@pytest.mark.parametrize(
    ("keys", "stored"),
    [
        ({}, "bfloat16"),
        ({"dtype": "float32"}, "float32"),
        ({"dtype": "torch.float16"}, "float16"),
        ({"dtype": "float32", "out_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "bfloat16", "out_dtype": "float32"}, "float32"),
    ],
)
def test_dtypes(merge_recipe: MergeRecipe, keys: dict[str, str], stored: str):
    merged = merge_recipe({**TIES, **keys})
    assert {str(tensor.dtype) for tensor in merged.values()} == {f"torch.{stored}"}


def test_the_plan_shows_gradients_filters_and_coefficients(scene: Scene):
    models = [
        {"model": "in/math", "parameters": {"weight": [0, 0.5]}},
        {"model": "in/code", "parameters": {"weight": [{"filter": "mlp", "value": 0.5}, {"value": 1}]}},
    ]
    recipe = {"merge_method": "task_arithmetic", "base_model": "in/base", "models": models, "parameters": {"lambda": 2}}
    write(recipe)
    assert "  in/math: weight [0, 0.5]\n  in/code: weight [mlp: 0.5, else 1]\n" in scene.run("--dry_run").out
    plan = json.loads(scene.run("--dry_run", "--json").out)
    assert all("coefficient" not in entry for entry in plan["coefficients"])
    write({**recipe, "models": MODELS})
    plan = json.loads(scene.run("--dry_run", "--json").out)
    assert [entry["coefficient"] for entry in plan["coefficients"]] == [1.0, 0.6]


def layers_of_plan(scene: Scene, recipe: Any) -> tuple[str, Any]:
    """What a plan says of the layers, for people and for programs."""
    write(recipe)
    text = scene.run("--dry_run").out
    plan = json.loads(scene.run("--dry_run", "--json").out)
    return text.partition("\nlayers:\n")[2].partition("tensors:\n")[0], plan.get("layers")


def test_the_plan_says_which_layers_a_stack_is_made_of(scene: Scene):
    """Slices that go on from each other are one range; what lies outside of the layers has lines of its own."""
    recipe = stack(
        ("math", 0, 1), ("math", 1, 2), ("code", 1, 2), ("code", 0, 1), ("instruct", 0, 2), ("instruct", 0, 1)
    )
    text, layers = layers_of_plan(scene, recipe)
    assert text == (
        "  layers 0-1: in/math layers 0-1\n"
        "  layer 2: in/code layer 1\n"
        "  layer 3: in/code layer 0\n"
        "  layers 4-5: in/instruct layers 0-1\n"
        "  layer 6: in/instruct layer 0\n"
        "  model.embed_tokens.weight: in/math\n"
        "  lm_head.weight, model.norm.weight: in/instruct\n"
    )
    assert layers == [
        {"layers": [0, 2], "from": [{"model": "in/math", "layers": [0, 2]}]},
        {"layers": [2, 3], "from": [{"model": "in/code", "layers": [1, 2]}]},
        {"layers": [3, 4], "from": [{"model": "in/code", "layers": [0, 1]}]},
        {"layers": [4, 6], "from": [{"model": "in/instruct", "layers": [0, 2]}]},
        {"layers": [6, 7], "from": [{"model": "in/instruct", "layers": [0, 1]}]},
        {"tensors": ["model.embed_tokens.weight"], "from": [{"model": "in/math"}]},
        {"tensors": ["lm_head.weight", "model.norm.weight"], "from": [{"model": "in/instruct"}]},
    ]


def test_the_plan_says_which_layers_are_merged_with_each_other(scene: Scene):
    recipe = slerp_slices([0, 1], [1, 2], parameters={"t": 0.5})
    recipe["slices"].append({"sources": [{"model": "in/math", "layer_range": [0, 1]}]})
    text, layers = layers_of_plan(scene, recipe)
    assert text == (
        "  layer 0: base in/base layer 0, in/math layer 1\n"
        "  layer 1: in/math layer 0\n"
        "  model.embed_tokens.weight: base in/base, in/math\n"
        "  lm_head.weight, model.norm.weight: in/math\n"
    )
    base = {"model": "in/base", "base": True}
    assert layers[0] == {"layers": [0, 1], "from": [{**base, "layers": [0, 1]}, {"model": "in/math", "layers": [1, 2]}]}
    assert layers[2] == {"tensors": ["model.embed_tokens.weight"], "from": [base, {"model": "in/math"}]}


def test_the_plan_of_whole_models_in_slices_says_so(scene: Scene):
    """Halves that are merged with weights of their own are one range, as each model's layers go on."""
    sources = [[{"model": f"in/{name}", "layer_range": [at, at + 1]} for name in ("math", "code")] for at in (0, 1)]
    slices = [
        {"sources": one, "parameters": {"weight": weight}} for one, weight in zip(sources, (0.3, 0.6), strict=True)
    ]
    text, layers = layers_of_plan(scene, {"merge_method": "ties", "base_model": "in/base", "slices": slices})
    models = "base in/base layers 0-1, in/math layers 0-1, in/code layers 0-1"
    assert text == (
        f"  layers 0-1: {models}\n"
        "  model.embed_tokens.weight, lm_head.weight, model.norm.weight: base in/base, in/math, in/code\n"
    )
    assert [entry.get("layers") for entry in layers] == [[0, 2], None]
    whole = layers_of_plan(scene, slerp_slices([0, 2], [0, 2], parameters={"t": 0.5}))
    assert whole[0].startswith("  layers 0-1: base in/base layers 0-1, in/math layers 0-1\n")
    assert whole[1][1]["from"] == [{"model": "in/base", "base": True}, {"model": "in/math"}]
    assert layers_of_plan(scene, TIES) == ("", None)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_metod": "ties"}, "unknown key 'merge_metod'. Did you mean 'merge_method'?"),
        ({"merge_method": "tise"}, "merge_method: unknown method 'tise'. Did you mean 'ties'?"),
        ({"merge_method": None}, "merge_method: expected the name of a method, got nothing"),
        ({"models": None}, "expected models or slices, got neither"),
        ({"slices": []}, "expected models or slices, got both"),
        ({"models": []}, "models: expected a list with at least one entry, got an empty list"),
        ({"models": ["in/math"]}, "models[0]: expected the key model, got 'in/math'"),
        ({"models": [{"modle": "in/math"}]}, "models[0]: expected the key model, got modle"),
        ({"models": [{"model": "in/math", "weight": 1}]}, "models[0]: unknown key 'weight'"),
        ({"models": [{"model": 3}]}, "models[0].model: expected a folder or the name of a model, got 3"),
        ({"models": [{"model": "in/math"}, {"model": "./in/math"}]}, "./in/math is named twice"),
        ({"parameters": {"densty": 1}}, "parameters: unknown parameter 'densty'. Did you mean 'density'?"),
        ({"parameters": {"density": 1.5}}, "parameters.density: expected a number in [0, 1], got 1.5"),
        ({"parameters": {"density": [0.5, 2]}}, "parameters.density: expected a number in [0, 1], got 2"),
        ({"parameters": {"density": []}}, "parameters.density: expected a value, got an empty list"),
        ({"parameters": {"density": "much"}}, "parameters.density: expected a number in [0, 1], got 'much'"),
        ({"parameters": {"density": [{"filter": "mlp"}]}}, "parameters.density: expected a number, a list of numbers, or"),
        ({"parameters": {"density": [{"filtre": "mlp", "value": 1}]}}, "unknown key 'filtre'. Did you mean 'filter'?"),
        ({"parameters": {"lambda": ".nan"}}, "parameters.lambda: expected a finite number, got"),
        ({"parameters": {"weight": -1e300}}, "parameters.weight: expected a finite number of at most 1e+18 in size, got -1e+300"),
        ({"parameters": {"lambda": [0.5, 10**400]}}, "parameters.lambda: expected a finite number of at most 1e+18 in size, got 1000"),
        ({"parameters": {"normalize": 0.5}}, "parameters.normalize: expected true or false, got 0.5"),
        ({"parameters": [1]}, "parameters: expected parameters such as weight, got [1]"),
        ({"dtype": "bfloat"}, "dtype: unknown dtype 'bfloat'. Did you mean 'bfloat16'?"),
        ({"seed": "zero"}, "seed: expected a whole number, got 'zero'"),
        ({"exclude": "("}, "exclude: expected a regular expression, got '('"),
        ({"modules": {"text": {}, "vision": {}}}, "modules: expected one, default"),
        ({"modules": {"default": {"models": []}}}, "modules.default: models is given beside modules too"),
        ({"residual_weight": 1}, "residual_weight: is not supported"),
        ({"tokenizer": {"source": "union"}, "tokenizer_source": "base"}, "tokenizer: tokenizer_source is given too"),
        ({"tokenizer": {"tokens": {"a": {}}}}, "tokenizer.tokens.a: expected the key source, got a mapping"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of: expected a whole number above 0, got 0"),
        ({"tie_word_embeddings": "maybe"}, "tie_word_embeddings: expected true or false, got 'maybe'"),
        ({"aim": 0.4}, "aim: expected keys such as omega, got 0.4"),
        ({"tokenizer": "union"}, "tokenizer: expected keys such as source, got 'union'"),
        ({"models": None, "slices": ["in/math"]}, "slices[0]: expected the key sources, got 'in/math'"),
        ({"models": [{"model": "in/math+"}]}, "models[0].model: "),
        ({"merge_method": "slerp", "models": [{"model": "in/math"}], "parameters": {"t": []}}, "parameters.t: expected a value, got an empty list"),
        ({"merge_method": "karcher", "parameters": {"max_iter": 1.5}}, "parameters.max_iter: expected a finite whole number, 0 or above, got 1.5"),
        ({"merge_method": "regmean", "parameters": {"moments": ["full", "diagonal"]}}, "parameters.moments: expected full or diagonal, got ['full', 'diagonal']"),
        ({"merge_method": "regmean"}, "models: in/math: regmean needs text of the model's own task. Add the key data, a file."),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(here: Path, change: dict[str, Any], message: str):
    recipe = {key: value for key, value in {**TIES, **change}.items() if value is not None}
    assert f"recipe.yml: {message}" in refusal(recipe) or message in refusal(recipe)


def test_everything_wrong_is_said_at_once(here: Path):
    message = refusal({**TIES, "dtyp": 1, "out_dtype": "x", "parameters": {"lambda": "x", "normalise": True}})
    assert message.startswith("4 problems:\n- recipe.yml: ")


def test_t_has_to_be_given_and_to_reach_every_tensor(here: Path):
    recipe = {"merge_method": "slerp", "base_model": "in/base", "models": [{"model": "in/math"}]}
    assert "parameters: t: slerp needs it" in refusal(recipe)
    write({**recipe, "parameters": {"t": [{"filter": "mlp", "value": 0.3}]}})
    err = call(merge, "--config", "recipe.yml", "--save_path", "out", code=2).err
    assert "t: says nothing of lm_head.weight" in err
    assert not Path("out").exists()


def test_the_number_of_models_is_checked(here: Path):
    recipe = {
        **TIES,
        "merge_method": "nuslerp",
        "models": [{"model": f"in/{name}"} for name in ("math", "code", "instruct")],
    }
    assert "models: nuslerp merges 2 models besides the base, got 3" in refusal(recipe)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True)),
        "a: &a {x: 1}\n" + "".join(f"{b}: &{b} {{<<: [{', '.join(['*' + a] * 9)}]}}\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True)),
        "a: &a [*a]",
        "[" * 100_000,
        "{" * 100_000,
        '{"a":' * 100_000,
        "- " * 50_000,
        "x: !!python/object/apply:os.system [ls]",
        "models: [",
        "a: 1\na: 2",
        "",
        "just text",
        "merge_method: " + "9" * 5000,
        "\x00",
        "x" * (MAX_BYTES + 1),
    ],
    ids=range(15),
)  # fmt: skip
def test_hostile_files_are_refused(here: Path, text: str):
    message = refusal(text)  # a bomb that goes off takes hours
    assert message.startswith("recipe.yml: ") or "problems:" in message
    assert len(message) < 2000


def test_anchors_of_an_honest_file_are_read(here: Path):
    write("x: 1\n")
    text = """
merge_method: ties
base_model: in/base
models:
  - model: in/math
    parameters: &same {weight: 0.5, density: 0.3}
  - model: in/code
    parameters: {<<: *same, weight: 0.25}
"""
    write(text)
    method = vars(read_recipe_file("recipe.yml").method("w"))
    assert (method["weights"], method["densities"]) == ((0.5, 0.25), (0.3, 0.3))


def test_files_that_are_none(here: Path):
    (here / "folder").mkdir()
    (here / "bytes").write_bytes(b"\xff\xfe\x00")
    for name, message in (
        ("nowhere.yml", "no such file"),
        ("folder", "got a folder"),
        ("bytes", "expected text in UTF-8"),
    ):
        with pytest.raises(InputError, match=message):
            read_recipe_file(name)


# ------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "flag", ["--method=ties", "--base_model=in/base", "--models_to_merge=in/math", "--weights=1", "--normalize"]
)
def test_flags_that_say_what_to_merge_contradict_a_file(here: Path, flag: str):
    write(TIES)
    err = call(merge, "--config", "recipe.yml", "--save_path", "out", flag, code=2).err
    assert f"{flag.partition('=')[0]}: --config says what to merge" in err


def test_flags_add_what_a_file_leaves_open_and_may_not_contradict_it(here: Path):
    write({**TIES, "merge_method": "dare_ties", "seed": 3, "out_dtype": "float32"})
    assert read_recipe_file("recipe.yml", seed=3, out_dtype="float32", exclude="norm").exclude == "norm"
    for key, value in (("seed", 4), ("out_dtype", "float16")):
        with pytest.raises(InputError, match=f"recipe.yml says {key}"):
            read_recipe_file("recipe.yml", **{key: value})
    write({**TIES, "merge_method": "dare_ties"})
    assert read_recipe_file("recipe.yml", seed=4).seed == 4
    assert read_recipe_file("recipe.yml").seed == 0
    write(TIES)
    with pytest.raises(InputError, match="seed: ties draws no random numbers"):
        read_recipe_file("recipe.yml", seed=4)


FLAGS = [
    ["--method=ties", "--models_to_merge=in/math:0.5,in/code:0.25", "--density=0.3,0.7", "--lambda=0.8", "--rescale"],
    ["--method=della", "--models_to_merge=in/math,in/code", "--epsilon=0.1", "--seed=5", "--exclude=norm", "--dtype=float32"],
    ["--method=karcher", "--models_to_merge=in/math,in/code", "--tol=1e-7"],
    ["--method=slerp", "--models_to_merge=in/base,in/code", "--t=0.2"],
    ["--method=widen", "--models_to_merge=in/math,in/code", "--widen_ratio=1.5"],
]  # fmt: skip


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_flags_written_as_a_recipe_merge_the_same(here: Path, flags: list[str]):
    flags = [*flags, "--base_model=in/base"]
    assert "written.yml: written" in call(merge, *flags, "--write_config=written.yml").out
    assert sorted(path.name for path in here.iterdir()) == ["in", "written.yml"]
    call(merge, *flags, "--save_path=one", "--quiet")
    call(merge, "--config=written.yml", "--save_path=other", "--quiet")
    call(merge, "--config=one/merge_recipe.json", "--save_path=third", "--quiet")
    for other in ("other", "third"):
        assert Path(other, "model.safetensors").read_bytes() == Path("one/model.safetensors").read_bytes()
    written = yaml.safe_load(Path("written.yml").read_text())
    if "--method=ties" in flags:
        assert written["models"][0] == {"model": "in/math", "parameters": {"weight": 0.5, "density": 0.3}}


def test_a_recipe_is_not_written_over_another_file(here: Path):
    Path("notes.yml").write_text("mine")
    flags = ["--method=ties", "--base_model=in/base", "--models_to_merge=in/math", "--write_config=notes.yml"]
    assert "is there already" in call(merge, *flags, code=2).err
    assert Path("notes.yml").read_text() == "mine"
    call(merge, *flags, "--overwrite")
    assert yaml.safe_load(Path("notes.yml").read_text())["merge_method"] == "ties"


def test_commits_of_a_merge_are_merged_again(here: Path):
    record = {
        "schema": 1,
        **TIES,
        "base_model": "org/base",
        "models": [{"model": "org/math"}, {"model": "org/code@v2"}],
    }
    record["inputs"] = [{"model": "org/base", "revision": "abc"}, {"model": "org/math", "revision": "def"}]
    record |= {"outputs": {}, "versions": {}, "command": [], "notes": [], "warnings": [], "report": None}
    Path("merge_recipe.json").write_text(json.dumps(record))
    recipe = read_recipe_file("merge_recipe.json")
    assert [str(name) for name in recipe.inputs] == ["org/base@abc", "org/math@def", "org/code@v2"]


# --------------------------------------------------------------------------------------------------------------- AIM


AIM = {
    "omega": [{"filter": "mlp", "value": 0.2}, {"value": 0.6}],
    "calibration": {"source": "texts.txt", "block_size": 32, "n_samples": 40},
}


def test_the_aim_block_is_its_flags(merge_recipe: MergeRecipe, here: Path):
    (here / "texts.txt").write_text("Merge two.\n" * 90)
    by_file = merge_recipe({**TIES, "aim": AIM}, save_path="file")
    flags = ["--method=ties", "--base_model=in/base", "--models_to_merge=in/math:0.5,in/code:0.3", "--density=1"]
    flags += ["--omega=mlp=0.2,0.6", "--calibration_data=texts.txt", "--block_size=32", "--n_samples=40"]
    call(merge, *flags, "--save_path=flags", "--quiet")
    for name, tensor in load_file("flags/model.safetensors").items():
        assert_same_bits(by_file[name], tensor)
    call(merge, "--config=file/merge_recipe.json", "--save_path=again", "--quiet")
    assert Path("again/model.safetensors").read_bytes() == Path("file/model.safetensors").read_bytes()
    call(merge, *flags, "--write_config=written.yml", "--quiet")
    call(merge, "--config=written.yml", "--save_path=written", "--quiet")
    assert Path("written/model.safetensors").read_bytes() == Path("file/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("aim", "flags", "message"),
    [
        ({"omga": 0.4}, [], "aim: unknown key 'omga'. Did you mean 'omega'?"),
        ({"scaling": "sqrt"}, [], "aim: expected omega, got none"),
        ({"omega": {"mlp": 0.4}}, [], "recipe.yml: aim.omega: expected a number, a list of numbers, or a list of entries"),
        ({"omega": 0.4, "calibration": {"blocksize": 3}}, [], "aim.calibration: unknown key 'blocksize'. Did you mean 'block_size'?"),
        ({"omega": 0.4, "calibration": 3}, [], "aim.calibration: expected keys such as source, got 3"),
        ({"omega": 1.4}, [], "recipe.yml: aim.omega: expected a number in [0, 1], got 1.4"),
        ({"omega": 0.4}, ["--omega=0.5"], "--omega: recipe.yml says 0.4 under aim"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_aim_block(here: Path, aim: Any, flags: list[str], message: str):
    write({**TIES, "aim": aim})
    err = call(merge, "--config", "recipe.yml", "--save_path", "out", *flags, code=2).err
    assert message in err


def test_aim_needs_a_base(here: Path):
    write({"merge_method": "linear", "models": MODELS, "aim": {"omega": 0.4}})
    err = call(merge, "--config", "recipe.yml", "--save_path", "out", code=2).err
    assert "base_model: AIM needs one" in err


@pytest.mark.parametrize("architecture", ["gpt2", "bloom", "gemma3", "mixtral"])
def test_stacks_of_other_architectures_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str):
    """Other names of layers and of their number, lists of layers, experts, tied heads."""
    from transformers import AutoModelForCausalLM

    family = make_family(tmp_path / "family", architecture, n_models=1)
    monkeypatch.chdir(tmp_path)
    sources = [(family.base, [0, 2]), (family.models[0], [1, 2]), (family.base, [0, 1])]
    slices = [{"sources": [{"model": str(folder), "layer_range": layers}]} for folder, layers in sources]
    write({"merge_method": "passthrough", "slices": slices})
    call(merge, "--config", "recipe.yml", "--save_path", "out", "--quiet")
    model, report = AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.num_hidden_layers == 4
    ours, (base, tuned) = (
        load_file("out/model.safetensors"),
        (load_file(folder / "model.safetensors") for folder in (family.base, family.models[0])),
    )
    stack = next(iter(find_layers(ours).counts))
    for name, tensor in ours.items():
        parts = find_layers(ours).split(name)
        if parts is None:
            continue
        source, layer = [(base, 0), (base, 1), (tuned, 1), (base, 0)][parts.layer]
        assert parts.prefix == stack
        assert_same_bits(tensor, source[parts.at(layer)], where=name)
    outside = [name for name in ours if find_layers(ours).split(name) is None]
    last = [name for name in outside if name in base]
    assert last, "expected embeddings and norms"
    assert all(torch.equal(ours[name], base[name]) for name in last)
