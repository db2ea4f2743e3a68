"""Compare evaluated models: the AIM paper's table from results files or a CSV of scores, with hypervolume gain and figures.

    python compare_models.py results/*.json --figures figures/ --out table.md
    python compare_models.py scores.csv --population hv_population_used --out table.csv

docs/comparing.md says what the columns mean and how sure they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints.problems import Problems
from checkpoints.screen import say
from commands import shell
from commands.command_line import Parser

if TYPE_CHECKING:
    from reports.entries import Entry


def build_parser() -> Parser:
    """The flags of compare_models.py."""
    parser = Parser(prog="compare_models.py", description=__doc__)
    what = parser.add_argument_group("what to compare")
    what.add_argument("files", common=True, nargs="+", metavar="FILE", help="results of evaluate_model.py (.json), of merges and of the models that were merged; or a table of scores in percent (.csv)")  # fmt: skip
    what.add_argument("--population", common=True, metavar="A,B", help="the models that HV gain is measured against: their names, or a column of the CSV that names them (default: the models that were merged)")  # fmt: skip
    what.add_argument("--benchmarks", common=True, metavar="A,B", help="columns (default: those of the paper's six that were evaluated)")  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument("--out", common=True, metavar="FILE", help="write the table too: .md, .tex (two digits), .csv (percent) or .json (fractions)")  # fmt: skip
    output.add_argument("--overwrite", common=True, action="store_true", help="replace --out where it exists")
    output.add_argument("--figures", common=True, metavar="FOLDER", help="draw HV gain over omega, changes by benchmark and Pareto fronts, as PNG and SVG")  # fmt: skip
    output.add_argument("--quiet", common=True, action="store_true", help="print warnings and errors only")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return shell.run(build_parser(), run, argv)


def run(arguments: argparse.Namespace) -> None:
    """Files -> entries -> table -> text and figures."""
    from reports import compare, draw, load_results
    from reports.figures import check_folder
    from reports.table import check_out

    files = [Path(file).expanduser() for file in arguments.files]
    out = Path(arguments.out).expanduser() if arguments.out is not None else None
    figures = Path(arguments.figures).expanduser() if arguments.figures is not None else None
    entries: list[Entry] = []
    problems = Problems()
    with problems.collect():
        if out is not None:
            check_out(out, files, overwrite=arguments.overwrite)
    with problems.collect():
        if figures is not None:
            check_folder(figures)
    with (
        problems.collect(),
        shell.progress_bar("reading", len(files), " files", quiet=arguments.quiet) as advance,
    ):
        entries = load_results(files, advance)
    problems.raise_if_any()
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
