"""Results in; the paper's table, hypervolume gain and figures out. Imports neither torch nor transformers.

from reports import compare, draw, load_results

table = compare(load_results(["results/code.json", "results/math.json", "results/merged.json"]))
print(table.to_markdown())
draw(table, "figures")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpoints.lazy import lazy_exports

if TYPE_CHECKING:
    from reports.bootstrap import Verdicts as Verdicts
    from reports.comparison import compare as compare
    from reports.entries import Entry as Entry
    from reports.figures import draw as draw
    from reports.hypervolume import hv_gain as hv_gain
    from reports.loading import load_results as load_results
    from reports.table import Table as Table
else:
    __getattr__ = lazy_exports(
        __name__,
        {
            "Entry": "reports.entries",
            "Table": "reports.table",
            "Verdicts": "reports.bootstrap",
            "compare": "reports.comparison",
            "draw": "reports.figures",
            "hv_gain": "reports.hypervolume",
            "load_results": "reports.loading",
        },
    )

__all__ = ["Entry", "Table", "Verdicts", "compare", "draw", "hv_gain", "load_results"]
