"""Checkpoints in, one checkpoint out.

from merging import RunOptions, make_recipe, merge

recipe = make_recipe("ties", "BASE", "A,B", parameters={"density": 0.3})
result = merge(recipe, "OUT")
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "merge": "merging.run",
    "RunOptions": "streaming.output",
    "make_recipe": "merging.recipe_flags",
    "read_recipe_file": "merging.recipe_file",
    "Recipe": "merging.recipe",
    "Result": "streaming.job",
}
__all__ = ["Recipe", "Result", "RunOptions", "make_recipe", "merge", "read_recipe_file"]


def __getattr__(name: str) -> Any:
    """Import on first use: `--help` needs the names of the methods, and neither torch nor the engine."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'merging' has no attribute '{name}'")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
