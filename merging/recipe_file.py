"""Read and write recipes in files: mergekit's YAML and our merge_recipe.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from checkpoints.files import write_text
from merging.recipe import Recipe
from merging.recipe_reader import Reader
from merging.safe_yaml import read_data


def read_recipe_file(
    path: Path | str,
    *,
    seed: int | None = None,
    out_dtype: str | None = None,
    exclude: str | None = None,
    only: str | None = None,
    layout: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Recipe:
    """Read a recipe: mergekit's YAML with our own keys besides, or the merge_recipe.json of a merge.

    Args:
        path: the file. Folders named in it are relative to the current one.
        seed, out_dtype, exclude, only, layout (keys of `Layout`): what flags say besides; refused where the file says
            something else.
        trust_remote_code: let a file name a method as `package.module:Class`, whose code runs.

    Raises: Refusals (an InputError): every problem; exit code 2.
    """
    where = str(path)
    content = read_data(Path(path).expanduser(), where)
    reader = Reader(where, trust_remote_code=trust_remote_code)
    flags = {"seed": seed, "out_dtype": out_dtype, "exclude": exclude, "only": only, "layout": layout or {}}
    recipe = reader.read(content, flags)
    reader.problems.raise_if_any()
    assert recipe is not None
    return recipe


def write_recipe_file(recipe: Recipe, path: Path, aim: Mapping[str, Any] | None = None) -> None:
    """Write a recipe as YAML that `read_recipe_file` reads, whole or not at all. Raises InputError where it cannot be written."""
    content = {key: value for key, value in recipe.as_json().items() if value is not None and value != {}}
    if recipe.out_dtype == "auto":  # which is what a file means that says nothing
        del content["out_dtype"]
    if aim:
        content["aim"] = dict(aim)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    write_text(path, text, name="write_config")
