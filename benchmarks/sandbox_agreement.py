"""Compare the sandbox's verdicts with those of one interpreter that runs a program and then its test.

    python benchmarks/sandbox_agreement.py --data_dir DATA
    python benchmarks/sandbox_agreement.py --data_dir DATA --broken 2000

The programs are the reference solutions of HumanEval and MBPP, and broken ones: copies of which one operator, comparison,
constant or condition is another, by a rule that gives the same ones each time. (A few of them still are right.) The published
checkers run program and test in one interpreter; here that, too, happens inside the jail. Exit code 1 where a verdict
differs. Listed as well: the items whose tests handle objects of the program besides plain values and functions.
"""

from __future__ import annotations

import argparse
import ast
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.benchmarks import get_benchmark, humaneval, mbpp
from evaluation.data import load_data
from evaluation.sandbox import Program, Sandbox

TIMEOUT_S = 10.0
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    **{
        ast.Add: ast.Sub,
        ast.Sub: ast.Add,
        ast.Mult: ast.Add,
        ast.Div: ast.Mult,
        ast.FloorDiv: ast.Div,
        ast.Mod: ast.FloorDiv,
    },
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And, ast.USub: ast.UAdd},
}
# Run by the judge after a test: what it has got of the program that is neither a plain value nor a function.
NO_LIVE_OBJECTS = """
import gc, sys
kind = sys.modules["jail.judge"].Remote
found = sorted({one._kind for one in gc.get_objects() if type(one) is kind and one._kind != "function"})
assert not found, ", ".join(found)
"""


def broken(source: str, given_lines: int, seed: str) -> str | None:
    """A program of which one thing is another, after the lines that its prompt gives; None where nothing can be."""
    tree = ast.parse(source)
    nodes = [node for node in ast.walk(tree) if getattr(node, "lineno", 0) > given_lines]
    places = [node for node in nodes if _changes(node) is not None]
    if not places:
        return None
    choice = random.Random(seed)
    node = choice.choice(places)
    change = _changes(node)
    assert change is not None
    field, values = change
    setattr(node, field, choice.choice(values))
    return ast.unparse(tree) + "\n"


def _changes(node: ast.AST) -> tuple[str, list[object]] | None:
    """(the field of a node that can be changed, what to)."""
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.UnaryOp, ast.AugAssign)) and type(node.op) in SWAPS:
        return "op", [SWAPS[type(node.op)]()]
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        return "ops", [[SWAPS[type(node.ops[0])](), *node.ops[1:]]]
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return "value", [node.value + 1, node.value - 1]
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        return "test", [ast.UnaryOp(ast.Not(), node.test)]
    if isinstance(node, ast.Return) and node.value is not None:
        return "value", [ast.Constant(None), ast.List([node.value], ast.Load())]
    return None


@dataclass(frozen=True)
class Item:
    """A program with its test.

    Attributes:
        name: of the task.
        judged: as it is graded here.
        published: the test as the published checkers run it, in the program's interpreter.
        given_lines: how many of the source's lines its prompt gives.
    """

    name: str
    judged: Program
    published: str
    given_lines: int = 0

    def in_one_interpreter(self) -> Program:
        """A program that runs this one and its test, and has no test itself."""
        parts = [("<program>", self.judged.source), ("<test>", self.published)]
        lines = [f"exec(compile({text!r}, {name!r}, 'exec', dont_inherit=True), globals())" for name, text in parts]
        return replace(self.judged, source="\n".join(lines), test="", names=())


def references(data_dir: Path) -> Iterator[Item]:
    """The reference solutions of both benchmarks."""
    for row in load_data(get_benchmark("humaneval"), data_dir).rows:
        judged = humaneval.judged(row, row["prompt"] + row["canonical_solution"])
        published = f"{row['test']}\ncheck({row['entry_point']})\n"
        yield Item(row["task_id"], _patient(judged), published, row["prompt"].count("\n"))
    for row in load_data(get_benchmark("mbpp"), data_dir).rows:
        judged = mbpp.judged(row, row["code"])
        yield Item(f"MBPP/{row['task_id']}", _patient(judged), judged.test)


def _patient(program: Program) -> Program:
    return replace(program, timeout_s=TIMEOUT_S)


def compare(kind: str, items: Sequence[Item], sandbox: Sandbox) -> int:
    """Print how the verdicts compare; returns how many differ."""
    apart = sandbox.run([item.judged for item in items])
    together = sandbox.run([item.in_one_interpreter() for item in items])
    pairs = Counter((one.status, other.status) for one, other in zip(apart, together, strict=True))
    print(f"{kind}: {len(items)}")
    for (one, other), count in sorted(pairs.items()):
        print(f"  {one} here, {other} in one interpreter: {count}")
    differing = [index for index in range(len(items)) if apart[index].status != together[index].status]
    for index in differing:
        print(f"  {items[index].name}: {apart[index].detail!r} here, {together[index].detail!r} in one interpreter")
        print(items[index].judged.source)
    return len(differing)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data_dir", type=Path, required=True, help="folder with the test sets, as for evaluate_model.py"
    )
    parser.add_argument("--broken", type=int, default=500, help="how many broken programs")
    arguments = parser.parse_args(argv)
    right = list(references(arguments.data_dir))
    wrong: list[Item] = []
    attempt = 0
    while len(wrong) < arguments.broken:
        for item in right:
            source = broken(item.judged.source, item.given_lines, f"{item.name} {attempt}")
            if source is not None:
                wrong.append(replace(item, judged=replace(item.judged, source=source, timeout_s=TIMEOUT_S / 10)))
        attempt += 1
    random.Random(0).shuffle(wrong)
    with Sandbox() as sandbox:
        print(f"sandbox {sandbox.level.value}")
        differing = compare("reference solutions", right, sandbox)
        differing += compare("broken programs", wrong[: arguments.broken], sandbox)
        looked = [replace(item.judged, test=item.judged.test + NO_LIVE_OBJECTS) for item in right]
        verdicts = sandbox.run(looked)
    live = [(item.name, v.detail) for item, v in zip(right, verdicts, strict=True) if v.status != "passed"]
    print(f"tests with plain values and functions only: {len(right) - len(live)} of {len(right)}")
    for name, detail in live:
        print(f"  {name}: {detail}")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
