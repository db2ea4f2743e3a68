"""Results in; the paper's table, hypervolume gain and figures out. Imports neither torch nor transformers.

from reports import compare, draw, load_results

table = compare(load_results(["results/code.json", "results/math.json", "results/merged.json"]))
print(table.to_markdown())
draw(table, "figures")
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "Entry": "reports.entries",
    "Table": "reports.table",
    "Verdicts": "reports.bootstrap",
    "compare": "reports.comparison",
    "draw": "reports.figures",
    "hv_gain": "reports.hypervolume",
    "load_results": "reports.loading",
}
__all__ = ["Entry", "Table", "Verdicts", "compare", "draw", "hv_gain", "load_results"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `--help` needs neither matplotlib nor moocore."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'reports' has no attribute '{name}'")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
