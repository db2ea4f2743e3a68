"""Which share of each package's lines the tests have run, from what `make coverage` measured.

    python -m tests.coverage_table                          # a row for each package
    python -m tests.coverage_table --missing merging aim    # and every line of these that no test runs

Lines for type checkers alone are not counted.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from coverage import Coverage

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str] | None = None) -> int:
    """Print the table; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--missing", nargs="*", default=[], help="packages whose lines to list that no test runs")
    wanted = parser.parse_args(argv).missing
    coverage = Coverage(config_file=str(ROOT / "pyproject.toml"))
    coverage.load()  # what pytest has put together; processes that outlived it have left more
    coverage.combine(strict=False)
    statements: dict[str, int] = defaultdict(int)
    run: dict[str, int] = defaultdict(int)
    listed = []
    for package in sorted({Path(source).name for source in coverage.get_option("run:source") or ()}):  # type: ignore[union-attr]
        for path in sorted((ROOT / package).rglob("*.py")):
            _, lines, _, missing, text = coverage.analysis2(str(path))
            statements[package] += len(lines)
            run[package] += len(lines) - len(missing)
            if missing and package in wanted:
                listed.append(f"{path.relative_to(ROOT)}: {text}")
    print("| package | lines | run by a test |\n|---|---:|---:|")
    for package, count in statements.items():
        print(f"| `{package}` | {count:,} | {100 * run[package] / count:.1f} % |")
    total = sum(statements.values())
    print(f"| all | {total:,} | {100 * sum(run.values()) / total:.1f} % |")
    print("\n".join(listed))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
