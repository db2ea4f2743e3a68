"""Compare evaluated models: the AIM paper's table from results files or a CSV of scores, with hypervolume gain and figures.

    python compare_models.py results/*.json --figures figures/ --out table.md
    python compare_models.py scores.csv --population hv_population_used --out table.csv

docs/comparing.md says what the columns mean and how sure they are.
"""

from __future__ import annotations

from checkpoints import early  # isort: skip # noqa: F401 - before anything that takes time to import

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import command_line
from checkpoints.errors import InputError, Refusals, collecting
from checkpoints.screen import say

if TYPE_CHECKING:
    from reports.entries import Entry


def build_parser() -> command_line.Parser:
    """The flags of compare_models.py."""
    parser = command_line.Parser(prog="compare_models.py", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="results of evaluate_model.py (.json), of merges and of the models that were merged; or a table of scores in percent (.csv)")  # fmt: skip
    parser.add_argument("--population", metavar="A,B", help="the models that HV gain is measured against: their names, or a column of the CSV that names them (default: the models that were merged)")  # fmt: skip
    parser.add_argument("--benchmarks", metavar="A,B", help="columns (default: those of the paper's six that were evaluated)")  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="FILE", help="write the table too: .md, .tex (two digits), .csv (percent) or .json (fractions)")  # fmt: skip
    output.add_argument("--overwrite", action="store_true", help="replace --out where it exists")
    output.add_argument("--figures", metavar="FOLDER", help="draw HV gain over omega, changes by benchmark and Pareto fronts, as PNG and SVG")  # fmt: skip
    output.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return command_line.run(build_parser(), run, argv)


def run(arguments: argparse.Namespace) -> None:
    """Files -> entries -> table -> text and figures."""
    from reports import compare, draw, load_results
    from reports.figures import check_folder
    from reports.table import check_out

    files = [Path(file).expanduser() for file in arguments.files]
    out = Path(arguments.out).expanduser() if arguments.out is not None else None
    figures = Path(arguments.figures).expanduser() if arguments.figures is not None else None
    entries: list[Entry] = []
    problems: list[str | InputError] = []
    with collecting(problems):
        if out is not None:
            check_out(out, files, overwrite=arguments.overwrite)
    with collecting(problems):
        if figures is not None:
            check_folder(figures)
    with (
        collecting(problems),
        command_line.progress_bar("reading", len(files), quiet=arguments.quiet, unit=" files") as advance,
    ):
        entries = load_results(files, advance)
    if problems:
        raise Refusals(problems)
    benchmarks = None if arguments.benchmarks is None else [name.strip() for name in arguments.benchmarks.split(",")]
    table = compare(entries, arguments.population, benchmarks)
    said = [table.to_markdown()]
    if out is not None:
        table.write(out)
        said.append(f"{out}: written")
    if figures is not None:
        drawn = draw(table, figures)
        said += [f"{figures}: {len(drawn.paths)} files written", *drawn.missing]
    if not arguments.quiet:
        print(*said, sep="\n")
        return
    for warning in table.warnings:
        say(f"warning: {warning}")


if __name__ == "__main__":
    command_line.end(main())
