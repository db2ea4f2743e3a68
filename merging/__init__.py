"""Checkpoints in, one checkpoint out.

from merging import RunOptions, make_recipe, merge

recipe = make_recipe("ties", "BASE", "A,B", parameters={"density": 0.3})
result = merge(recipe, "OUT")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpoints.lazy import lazy_exports

if TYPE_CHECKING:
    from merging.merge_work import merge as merge
    from merging.recipe import Recipe as Recipe
    from merging.recipe_file import read_recipe_file as read_recipe_file
    from merging.recipe_flags import make_recipe as make_recipe
    from streaming.job import Result as Result
    from streaming.output import RunOptions as RunOptions
else:
    __getattr__ = lazy_exports(
        __name__,
        {
            "merge": "merging.merge_work",
            "RunOptions": "streaming.output",
            "make_recipe": "merging.recipe_flags",
            "read_recipe_file": "merging.recipe_file",
            "Recipe": "merging.recipe",
            "Result": "streaming.job",
        },
    )

__all__ = ["Recipe", "Result", "RunOptions", "make_recipe", "merge", "read_recipe_file"]
