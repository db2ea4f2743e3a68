"""Compare evaluated models: the AIM paper's table from results files or a CSV of scores, with hypervolume gain and figures.

    python compare_models.py results/*.json --figures figures/ --out table.md
    python compare_models.py scores.csv --population hv_population_used --out table.csv

docs/comparing.md says what the columns mean and how sure they are.
"""

from checkpoints import early  # isort: skip # noqa: F401 - before anything that takes time to import

from checkpoints.process import end
from commands.compare_models import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    end(main())
