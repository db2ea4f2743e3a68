"""Read and write recipes in files: mergekit's YAML and our merge_recipe.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from checkpoints.errors import ArgumentError
from checkpoints.files import write_text
from checkpoints.problems import Problems
from merging.recipe import Recipe
from merging.recipe_documents import Documents, split
from merging.recipe_reader import Reader, revisions
from merging.safe_yaml import read_documents


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
    """Read a recipe: mergekit's YAML with our own keys besides, of one document or several, or the merge_recipe.json of a merge.

    Args:
        path: the file. Folders named in it are relative to the current one.
        seed, out_dtype, exclude, only, layout (keys of `Layout`): what flags say besides; refused where the file says
            something else.
        trust_remote_code: let a file name a method as `package.module:Class`, whose code runs.

    Raises: Refusals (an InputError): every problem; exit code 2.
    """
    where = str(path)
    problems = Problems()
    content, named = split(where, read_documents(Path(path).expanduser(), where), problems)
    problems.raise_if_any()
    pinned = revisions(content.get("inputs")) if isinstance(content, dict) and "schema" in content else {}

    def read_named(name: str, own: Any) -> Recipe | None:
        """One of the merges that others use as a model; what flags say is of the last one alone."""
        inner = Reader(f"{where}: {name}", trust_remote_code=trust_remote_code, documents=documents)
        inner.pinned = pinned
        if isinstance(own, dict) and own.get("aim") is not None:
            inner.refuse("aim", "AIM relaxes the merge that is written. Move it there.")
        made = inner.read(own, {"seed": None, "out_dtype": None, "exclude": None, "only": None, "layout": {}})
        problems.extend(inner.problems)
        return made

    documents = Documents(where, named, read_named, problems)
    reader = Reader(where, trust_remote_code=trust_remote_code, documents=documents)
    flags = {"seed": seed, "out_dtype": out_dtype, "exclude": exclude, "only": only, "layout": layout or {}}
    recipe = reader.read(content, flags)
    problems.extend(reader.problems)
    for name in documents.unused if not problems else ():
        problems.add(ArgumentError(f"{where}: {name}: nothing uses this merge. Use it as a model, or leave it out."))
    problems.raise_if_any()
    assert recipe is not None
    return replace(recipe, merges={name: merge for name, merge in documents.recipes.items() if merge is not None})


def write_recipe_file(recipe: Recipe, path: Path, aim: Mapping[str, Any] | None = None) -> None:
    """Write a recipe as YAML that `read_recipe_file` reads, whole or not at all. Raises InputError where it cannot be written."""
    content = {key: value for key, value in recipe.as_json().items() if value is not None and value != {}}
    if recipe.out_dtype == "auto":  # which is what a file means that says nothing
        del content["out_dtype"]
    if aim:
        content["aim"] = dict(aim)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    write_text(path, text, name="write_config")
