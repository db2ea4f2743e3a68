"""Every method brings what docs/adding-a-method.md asks for, and methods from outside are imported by name or refused clearly."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from checkpoints.errors import ArgumentError, Refusals
from commands.command_line import show_flag
from merging.methods import METHODS, canonical, get_method
from merging.methods.outside import lacks
from merging.parameters import REQUIRED, SAME, Parameter, parameter, shared
from merging.recipe_file import read_recipe_file
from merging.recipe_flags import make_recipe
from tests.in_memory import make_method
from tests.reference.of_method import find

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/methods.md").read_text()


# --------------------------------------------------------------------------------------------- file, reference, card


@pytest.mark.parametrize("name", METHODS)
def test_what_the_source_says_is_what_the_class_says(name: str):
    """`--help` reads the files without importing them."""
    cls, entry = get_method(name), METHODS[name]
    assert lacks(cls) == []
    assert cls.name == name
    assert cls.draws == entry.draws
    assert {key: one for key, (one, _) in cls.parameters().items()} == entry.parameters


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_reference_whose_arguments_are_its_own(name: str):
    reference = find(name)
    for arguments in (reference.arguments, reference.single):
        if arguments is not None:
            needed = {key: value for key, value in reference.arguments.items() if key not in arguments}
            count = get_method(name).max_models or 3
            given = {
                key: value[:count] if isinstance(value, list) else value
                for key, value in (needed | dict(arguments)).items()
            }
            make_method(name, max(1, count), **given)


def test_a_missing_reference_says_what_to_add(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(METHODS, "new", METHODS["ties"])
    with pytest.raises(KeyError, match=r"tests/test_method_ties\.py: expected REFERENCES with 'new'"):
        find("new")


def rows_of(cls_parameters: dict[str, Parameter], draws: bool) -> list[tuple[str, str, str, str]]:
    """What a card's table has to say: parameter, flag, default, and how the column of ranges begins."""
    rows = []
    for one in cls_parameters.values():
        flag = show_flag(one.key, None)
        flag = f"`{flag}`, `--no-{one.key}`" if one.is_switch else f"`{flag}`"
        words = {True: "yes", False: "no", None: ""}
        default = (
            words[one.default]
            if one.is_switch
            else one.default
            if one.kind == "word"
            else f"{one.default:.10f}".rstrip("0")
            if one.default is not REQUIRED
            else "required"
        )
        default = default + "0" if default.endswith(".") and one.kind == "number" else default.removesuffix(".")
        rows.append((one.key + (", per model" if one.per_model else ""), flag, default, range_text(one)))
    return rows + ([("seed", "`--seed`", "0", "any integer")] if draws else [])


def range_text(one: Parameter) -> str:
    """The range in the words of the cards; empty where the words are the card's own."""
    if one.kind == "word":
        return " or ".join(one.words)
    if one.is_switch or (one.low, one.high) == (0.0, 0.5):
        return ""
    noun = "a whole number, " if one.kind == "whole" else ""
    if one.above > float("-inf"):
        return f"{noun}above {one.above:g}"
    if one.low > float("-inf"):
        return f"{noun}{one.low:g} or more" if one.high == float("inf") else f"{noun}{one.low:g} to {one.high:g}"
    return "any number"


def card_problems(name: str, page: str, parameters: dict[str, Parameter], draws: bool, reads_base: bool) -> list[str]:
    """What docs/methods.md lacks of a method: its line in the table at the top, its card, and the card's table."""
    problems = []
    line = re.search(rf"^\| \[{name}\]\(#{name}\) \| .+ \| (.+) \| (yes|no) \|$", page, re.MULTILINE)
    if not line:
        problems.append(f"{name}: no line '| [{name}](#{name}) | ... | reads | random |' in the table")
    elif line[2] != ("yes" if draws else "no") or ("without the base" in line[1]) == reads_base:
        problems.append(f"{name}: the line in the table says other than the class: {line[0]}")
    card = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    if not card:
        return [*problems, f"{name}: no card '## {name}'"]
    for part in ("**When.**", "**Source.**"):
        if part not in card[1]:
            problems.append(f"{name}: no {part} on its card")
    found = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\|.*\|$", card[1], re.MULTILINE)
    ][2:]
    wanted = rows_of(parameters, draws)
    if sorted(row[0] for row in found) != sorted(row[0] for row in wanted):
        problems.append(f"{name}: the table has {[row[0] for row in found]}, the class {[row[0] for row in wanted]}")
        return problems
    for row in wanted:
        (shown,) = [one for one in found if one[0] == row[0]]
        if shown[1] != row[1] or not shown[2].startswith(row[2]) or not shown[3].startswith(row[3]):
            problems.append(f"{name}: expected | {' | '.join(row)} ..., got | {' | '.join(shown)} |")
    return problems


@pytest.mark.parametrize("name", METHODS)
def test_every_card_says_what_the_class_says(name: str):
    cls = get_method(name)
    parameters = {key: one for key, (one, _) in cls.parameters().items()}
    assert card_problems(name, PAGE, parameters, cls.draws, cls.reads_base) == []


def test_the_page_has_no_card_of_a_method_that_is_none():
    assert set(re.findall(r"^## (\w+)$", PAGE, re.MULTILINE)) == set(METHODS)
    assert set(re.findall(r"^\| \[(\w+)\]\(#", PAGE, re.MULTILINE)) == set(METHODS)


def test_the_check_of_cards_sees_another_default_another_flag_and_a_missing_card():
    parameters = METHODS["slerp"].parameters
    assert card_problems("slerp", PAGE, parameters, False, True) == []
    for wrong in (
        PAGE.replace("| t | `--t` | 0.5;", "| t | `--t` | 0.4;"),
        PAGE.replace("| t | `--t` |", "| t | `--u` |"),
    ):
        assert len(card_problems("slerp", wrong, parameters, False, True)) == 1
    assert card_problems("slerp", PAGE.replace("## slerp\n", "## slurp\n"), parameters, False, True) == [
        "slerp: no card '## slerp'"
    ]
    assert len(card_problems("slerp", PAGE, parameters, True, True)) == 2


# ------------------------------------------------------------------------------------------- declarations of parameters


def test_a_key_belongs_to_its_method():
    """slerp's t may be below 0; nearswap's may not, and has no default."""
    assert make_recipe("slerp", "base", "a", parameters={"t": "-3"}).parameters["t"].as_json() == -3
    with pytest.raises(Refusals, match="t: expected a finite number, 0 or above, got -3"):
        make_recipe("nearswap", "base", "a", parameters={"t": "-3"})
    with pytest.raises(Refusals, match="t: nearswap needs it: a finite number, 0 or above"):
        make_recipe("nearswap", "base", "a")
    assert make_recipe("ram", "base", "a,b", parameters={"epsilon": "7"}).parameters["epsilon"].as_json() == 7
    with pytest.raises(Refusals, match=r"epsilon: expected a number in \[0, 0.5\], got 7"):
        make_recipe("della", "base", "a,b", parameters={"epsilon": "7"})


def test_a_default_outside_of_the_range_is_a_slip_of_the_author():
    with pytest.raises(ValueError, match=r"the default of x: expected a number in \[0, 1\], got 2"):
        parameter("x", "help", default=2.0, low=0.0, high=1.0)
    with pytest.raises(ValueError, match="the default of density"):
        shared("density", default=1.5)
    assert shared("density", default=0.7).metadata["parameter"].default == 0.7
    assert shared("rescale").default is None
    assert parameter("x", "help", default=REQUIRED).metadata["parameter"].in_files is SAME


# --------------------------------------------------------------------------------------------- methods from outside

GOOD = """
    from dataclasses import dataclass
    from typing import ClassVar
    from merging.methods.contract import Method
    from merging.parameters import parameter, shared

    LIST = [1]

    @dataclass(frozen=True)
    class Half(Method):
        share: float = parameter("share", "how far", default=0.5, low=0.0, high=1.0)

        def combine(self, block, statistics):
            return block.task_vectors[0].mul_(self.share).add_(block.base)

    class Plain(Half):
        more: int = 3

    @dataclass(frozen=True)
    class Lacking(Method):
        share: float = parameter("share", "how far", default=0.5)

    @dataclass(frozen=True)
    class Draws(Half):
        draws: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Strays(Half):
        more: int = 3

    @dataclass(frozen=True)
    class Nowhere(Half):
        space: ClassVar[str] = "space"

    @dataclass(frozen=True)
    class Device(Half):
        share: float = parameter("device", "taken", default=0.5)

    @dataclass(frozen=True)
    class Switch(Half):
        share: bool = parameter("t", "taken", default=True, kind="switch")
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with methods, good and bad; its name."""
    module = f"outside_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{module}.py").write_text(textwrap.dedent(GOOD))
    (tmp_path / f"{module}_broken.py").write_text("raise RuntimeError('half written')\n")
    (tmp_path / f"{module}_needs.py").write_text("import package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    return module


def test_a_method_from_outside(outside: str):
    name = f"{outside}:Half"
    assert get_method(name).__name__ == "Half"
    assert canonical(name) == name
    recipe = make_recipe(name, "base", "a", parameters={"share": "0.25"})
    assert recipe.as_json()["merge_method"] == name
    assert recipe.method("w").share == 0.25  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("ending", "says"),
    [
        ("_missing:Half", "expected a module that can be imported, got no module named '.*_missing'. Install it, or add its folder"),
        ("_broken:Half", "got RuntimeError: half written. Mend the module"),
        ("_needs:Half", "got ModuleNotFoundError: No module named 'package_that_is_not_there'. Mend the module"),
        (":Hulf", "unknown class 'Hulf'.*Half"),
        (":LIST", "expected a class derived from merging.methods.contract.Method, got list LIST"),
        (":Plain", r"expected @dataclass\(frozen=True\) above the class"),
        (":Lacking", "expected a definition of combine, got none"),
        (":Draws", "and seed: int = 0, got no seed"),
        (":Strays", r"every field to be set to parameter\(...\) or shared\(...\), got more"),
        (":Nowhere", "expected space to be task_vectors or weights, got 'space'"),
        (":a-b", "expected package.module:Class, got"),
    ],
)  # fmt: skip
def test_what_is_no_method_is_refused(outside: str, ending: str, says: str):
    with pytest.raises(ArgumentError, match=says):
        get_method(outside + ending)


def test_keys_that_cannot_be_flags_are_refused(outside: str, capsys: pytest.CaptureFixture[str]):
    import merge

    for cls, says in (
        ("Device", "its parameter device cannot be a flag"),
        ("Switch", "its parameter t cannot be a flag"),
    ):
        with pytest.raises(SystemExit) as end:
            merge.main(["--method", f"{outside}:{cls}", "--help"])
        assert end.value.code == 2
        assert says in capsys.readouterr().err


def test_a_recipe_file_imports_nothing_unless_it_is_trusted(outside: str, tmp_path: Path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"merge_method: {outside}_broken:Half\nbase_model: base\nmodels: [{{model: a}}]\n")
    with pytest.raises(Refusals, match=r"merge_method: expected the name of a method, got .*_broken:Half, Python code"):
        read_recipe_file(recipe)
    with pytest.raises(Refusals, match="RuntimeError: half written"):
        read_recipe_file(recipe, trust_remote_code=True)
    recipe.write_text(
        f"merge_method: {outside}:Half\nbase_model: base\nmodels: [{{model: a}}]\nparameters: {{share: 0.125}}\n"
    )
    read = read_recipe_file(recipe, trust_remote_code=True)
    assert read.method("w").share == 0.125  # type: ignore[attr-defined]
