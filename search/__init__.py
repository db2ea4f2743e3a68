"""Search for the recipe that is best for some texts, without a checkpoint per candidate.

from search import SearchRequest, tune

outcome = tune(SearchRequest(tree, {"math": Path("math.jsonl")}, Path("STUDY"), trials=60))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpoints.lazy import lazy_exports

if TYPE_CHECKING:
    from search.request import SearchRequest as SearchRequest
    from search.run import Outcome as Outcome
    from search.run import tune as tune
else:
    __getattr__ = lazy_exports(
        __name__, {"Outcome": "search.run", "SearchRequest": "search.request", "tune": "search.run"}
    )

__all__ = ["Outcome", "SearchRequest", "tune"]
