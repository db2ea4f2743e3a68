"""What holds for the whole repository: who imports whom, nothing per architecture, nothing left half-done.

Every check is a function from sources to a list of problems, and is shown to find one in a made-up source.
"""

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "checkpoints",
    "alignment",
    "streaming",
    "forward",
    "merging",
    "aim",
    "evaluation",
    "reports",
    "adapters",
    "search",
)
SIBLINGS = {"merging", "aim", "evaluation", "reports", "adapters", "search"}
SCRIPTS = ("compare_models.py", "evaluate_model.py", "extract_lora.py", "merge.py", "performAIM.py", "tune_merge.py")
COMMANDS = [ROOT / name for name in SCRIPTS]

# Package -> top-level modules that nothing in it may import. Imports point down: to checkpoints, never to a command.
ABOVE = {"examples", "tests", "benchmarks", "commands", "argparse"}
FORBIDDEN = {package: SIBLINGS - {package} | ABOVE for package in PACKAGES}
FORBIDDEN["checkpoints"] |= {"streaming", "alignment", "forward"}
FORBIDDEN["search"] -= {"merging", "aim", "evaluation", "reports"}  # it makes many merges, and compares them
FORBIDDEN["streaming"] |= {"alignment"}  # the loop knows no model, and what aligns models knows no loop
FORBIDDEN["alignment"] |= {"streaming"}
FORBIDDEN["forward"] |= {"streaming", "alignment"}
for package in ("streaming", "alignment"):
    FORBIDDEN[package] |= {"forward"}
for modules in FORBIDDEN.values():
    modules.update(path.stem for path in COMMANDS)
FORBIDDEN["reports"] |= {"torch", "transformers"}

ARCHITECTURE = re.compile(r"llama|mistral|mixtral|qwen|gemma|phi_?-?3|gpt_?-?2|gpt_?-?neox|olmo|falcon|bloom", re.I)
HEAVY = ("torch", "transformers", "datasets", "accelerate", "lm_eval", "vllm", "matplotlib", "optuna")
MARKER = re.compile(r"\b(?:" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"]) + r")\b")
PIN = re.compile(r"[A-Za-z0-9._-]+(?:\[[a-z0-9_,-]+\])?==\d+(?:\.\d+)+(?:\.?(?:a|b|rc|post)\d+)?(?: *;.+)?")


def sources(*folders: str) -> Iterator[tuple[str, str]]:
    """(path from the repository's root, text) of every Python file in folders, sorted."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text()


# ---------------------------------------------------------------------------------------------- import direction


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every absolute import, in functions and under TYPE_CHECKING too, and by name in a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (
                (node.lineno, argument.value)
                for argument in node.args[:1]
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            )


def import_problems(path: str, source: str, forbidden: dict[str, set[str]]) -> list[str]:
    package = path.split("/")[0]
    return [
        f"{path}:{line}: {package} imports {module}; imports point down, and a command composes packages"
        for line, module in imported_modules(ast.parse(source))
        if module.split(".")[0] in forbidden[package]
    ]


def test_imports_only_point_down():
    problems = [p for path, source in sources(*PACKAGES) for p in import_problems(path, source, FORBIDDEN)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "line",
    [
        "import aim",
        "import aim.formula as relax",
        "from aim.formula import relax",
        "def f():\n    from aim import formula",
        "import importlib\nimportlib.import_module('aim.formula')",
        "from reports import tables",
        "import argparse",
        "from commands.command_line import Parser",
    ],
)
def test_imports_check_finds_a_violation(line):
    assert len(import_problems("merging/stream.py", line, FORBIDDEN)) == 1
    assert len(import_problems("checkpoints/reader.py", line, FORBIDDEN)) == 1


@pytest.mark.parametrize("line", ["import torch", "from checkpoints import reader", "from merging import plan", ""])
def test_imports_check_accepts_what_is_below(line):
    assert import_problems("merging/stream.py", line, FORBIDDEN) == []


def test_the_page_says_who_may_import_whom():
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    told = {package: set(re.findall(r"`(\w+)`", allowed)) for package, allowed in rows}
    assert told.pop("commands") == set()  # "all of them"
    assert told == {package: set(PACKAGES) - FORBIDDEN[package] - {package} for package in PACKAGES}


def import_circles(texts: dict[str, str]) -> list[list[str]]:
    """Groups of modules that import each other, wherever the imports stand; a package's `__init__` is left out, as it names
    what lies in the package.

    Args:
        texts: path from the repository's root -> source.
    """
    modules = {path.removesuffix(".py").replace("/", "."): path for path in texts if not path.endswith("__init__.py")}
    below: dict[str, set[str]] = {}
    for module, path in modules.items():
        tree = ast.parse(texts[path])
        named = {name for _, name in imported_modules(tree)}
        named |= {
            f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.level == 0
            for alias in node.names
        }
        below[module] = named & modules.keys()

    def reached(module: str) -> set[str]:
        found: set[str] = set()
        waiting = list(below[module])
        while waiting:
            one = waiting.pop()
            if one not in found:
                found.add(one)
                waiting += below[one]
        return found

    reach = {module: reached(module) for module in modules}
    circles = {frozenset(one for one in reach[module] if module in reach[one]) for module in modules}
    return sorted(sorted(circle) for circle in circles if circle)


def test_no_modules_import_each_other():
    assert import_circles(dict(sources(*PACKAGES))) == []


def test_circle_check_finds_a_circle():
    texts = {
        "a/one.py": "def f():\n    from a import two",
        "a/two.py": "import typing\nif typing.TYPE_CHECKING:\n    from b.three import x",
        "b/three.py": "import a.one",
        "b/four.py": "import a.one",
        "a/__init__.py": "from a.one import f",
    }
    assert import_circles(texts) == [["a.one", "a.two", "b.three"]]


def test_imports_check_keeps_torch_out_of_reports():
    assert len(import_problems("reports/tables.py", "def f():\n    import torch.nn", FORBIDDEN)) == 1


# ------------------------------------------------------------------------------------------------- no flags below

FLAG = re.compile(r"(?<![\w-])--(?:no-)?([a-z][a-z_]+)")


def flags_of_commands() -> set[str]:
    """The name of every flag of the commands, but for what every program has."""
    parsers = [importlib.import_module(path.stem).build_parser() for path in COMMANDS]
    options = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    return {option.removeprefix("--") for option in options} - {"help", "version", "h"}


def flag_problems(path: str, source: str, flags: set[str]) -> list[str]:
    """Strings, docstrings and comments excepted, that hold a flag of a command: a message names a setting."""
    tree = ast.parse(source)
    prose = docstrings(tree)
    return [
        f"{path}:{node.lineno}: {match[0]}; write setting('{match[1]}'), which each door shows in its own way"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
        for match in FLAG.finditer(node.value)
        if match[1] in flags
    ]


def test_no_package_holds_a_flag():
    flags = flags_of_commands()
    assert {"omega", "n_samples", "save_path", "limit"} <= flags
    problems = [problem for path, source in sources(*PACKAGES) for problem in flag_problems(path, source, flags)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("line", ["x = '--omega: no'", "x = f'{y}: use --no-resume'", "f('a', b='see --omega.')"])
def test_flag_check_finds_a_flag(line):
    assert len(flag_problems("merging/plan.py", line, {"omega", "resume"})) == 1


@pytest.mark.parametrize(
    "line", ["x = '--dir'", '"""The value of --omega."""', "x = 'a--omega'", "x = setting('omega')"]
)
def test_flag_check_accepts_what_is_none(line):
    assert flag_problems("merging/plan.py", line, {"omega"}) == []


# ------------------------------------------------------------------------------------- no per-architecture branches


def docstrings(tree: ast.AST) -> set[int]:
    """ids of the nodes that are docstrings: a string that stands alone as a statement."""
    return {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def reads_model_type(node: ast.AST) -> bool:
    """Whether an expression holds `x.model_type`, `model_type`, `x["model_type"]` or `x.get("model_type")`."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute | ast.Name):
            name = part.attr if isinstance(part, ast.Attribute) else part.id
            if name == "model_type":
                return True
        key = part.slice if isinstance(part, ast.Subscript) else None
        if (
            isinstance(part, ast.Call)
            and isinstance(part.func, ast.Attribute)
            and part.func.attr == "get"
            and part.args
        ):
            key = part.args[0]
        if isinstance(key, ast.Constant) and key.value == "model_type":
            return True
    return False


def library_names(tree: ast.AST) -> set[str]:
    """Names imported from a library: whether transformers knows a model type is a question to it, no branch of ours."""
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] not in PACKAGES
        for alias in node.names
    }


def branches_on_model_type(node: ast.AST, tables: set[str]) -> bool:
    """A comparison of a model's type, a match on it, a table of it.

    Allowed are a comparison with another model's type or with None, and tables of a library (`tables`: their names).
    """
    if isinstance(node, ast.Compare):
        sides = [s for s in (node.left, *node.comparators) if not (isinstance(s, ast.Constant) and s.value is None)]
        sides = [s for s in sides if not (isinstance(s, ast.Name) and s.id in tables)]
        reads = [reads_model_type(side) for side in sides]
        return len(sides) > 1 and any(reads) and not all(reads)
    if isinstance(node, ast.Match):
        return reads_model_type(node.subject)
    if isinstance(node, ast.Subscript) and not (isinstance(node.value, ast.Name) and node.value.id in tables):
        return reads_model_type(node.slice)
    return False


def names_in(node: ast.AST) -> Iterator[str]:
    """Every identifier and string constant a node itself holds."""
    for _, value in ast.iter_fields(node):
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str):
                yield item


def architecture_problems(path: str, source: str) -> list[str]:
    tree = ast.parse(source)
    prose = docstrings(tree)
    tables = library_names(tree)
    problems = []
    for node in ast.walk(tree):
        where = f"{path}:{getattr(node, 'lineno', '?')}"
        if branches_on_model_type(node, tables):
            problems.append(
                f"{where}: a branch on model_type; tensors match by name and shape, modules by what they are"
            )
        if id(node) not in prose:
            problems += [
                f"{where}: {text!r} names an architecture" for text in names_in(node) if ARCHITECTURE.search(text)
            ]
    return problems


def test_no_branches_per_architecture():
    files = sources("checkpoints", "alignment", "streaming", "forward", "merging", "aim")
    problems = [problem for path, source in files for problem in architecture_problems(path, source)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "line",
    [
        "if config.model_type == kind: pass",
        "if kind in config['model_type']: pass",
        "fast = config.get('model_type') in FAST",
        "names = TABLE[config.model_type]",
        "from aim.tables import TABLE\nnames = TABLE[config.model_type]",
        "match config.model_type:\n    case _: pass",
        "names = {'gpt_neox': 1}",
        "def merge_qwen(): pass",
        "def f(x, *, is_mixtral=False): pass",
        "from transformers import LlamaConfig",
        "text = f'{name}.phi3'",
    ],
)
def test_architecture_check_finds_a_violation(line):
    assert len(architecture_problems("aim/relax_work.py", line)) == 1


@pytest.mark.parametrize(
    "line",
    [
        '"""Llama and GPT-2 store it so."""',
        'def f():\n    """Qwen3 has q_norm."""',
        "x = 1  # as Mixtral names it",
        "if base.model_type != other.model_type: pass",
        "if 'model_type' in config: pass",
        "if config.get('model_type') is None: pass",
        "kind = config['model_type']",
        "from transformers import CONFIG_MAPPING\nknown = config.model_type in CONFIG_MAPPING",
    ],
)
def test_architecture_check_accepts_prose_and_agreement(line):
    assert architecture_problems("aim/relax_work.py", line) == []


# -------------------------------------------------------------------------------------------------- instant --help

HELP = """
import json, runpy, sys
path, *heavy = sys.argv[1:]
sys.argv = [path, "--help"]
code = None
try:
    runpy.run_path(path, run_name="__main__")
except SystemExit as exit:
    code = exit.code or 0
print(json.dumps({"code": code, "loaded": [name for name in heavy if name in sys.modules]}), file=sys.stderr)
"""


def ask_for_help(command: Path) -> tuple[str, dict]:
    """(what `python COMMAND --help` prints, {"code": exit status, "loaded": the heavy libraries it imported})."""
    arguments = [sys.executable, "-c", HELP, str(command), *HEAVY]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command.name} --help failed:\n{done.stderr}"
    return done.stdout, json.loads(done.stderr.splitlines()[-1])


def test_help_of_every_command_is_instant():
    for command in COMMANDS:
        printed, result = ask_for_help(command)
        assert result == {"code": 0, "loaded": []}, f"{command.name} --help: expected exit 0 and no heavy import"
        assert printed.startswith("usage: "), f"{command.name} --help printed {printed[:80]!r}"


def test_help_check_finds_a_heavy_import(tmp_path):
    command = tmp_path / "command.py"
    command.write_text("import sys, types\nsys.modules['torch'] = types.ModuleType('torch')\nraise SystemExit(2)\n")
    assert ask_for_help(command) == ("", {"code": 2, "loaded": ["torch"]})


# ---------------------------------------------------------------------------------------------------- requirements


def pin_problems(path: str, text: str) -> list[str]:
    """Lines that are neither a comment, nor another file of requirements, nor one exact public version."""
    lines = [(number, line.split(" #")[0].strip()) for number, line in enumerate(text.splitlines(), 1)]
    return [
        f"{path}:{number}: expected NAME==VERSION, got {line!r}"
        for number, line in lines
        if line and not line.startswith("#") and not re.fullmatch(r"-r \S+\.txt", line) and not PIN.fullmatch(line)
    ]


def test_requirements_are_exact_pins():
    files = sorted(ROOT.glob("requirements*.txt"))
    assert [path.name for path in files] == [
        "requirements-dev.txt",
        "requirements-gpu.txt",
        "requirements-real.txt",
        "requirements-search.txt",
        "requirements-vllm-cpu.txt",
        "requirements.txt",
    ]
    problems = [problem for path in files for problem in pin_problems(path.name, path.read_text())]
    assert not problems, "\n".join(problems)
    assert re.findall(r"^\w\S*", files[-1].read_text(), re.MULTILINE)[0].startswith("torch==")


@pytest.mark.parametrize(
    "line",
    ["torch", "torch>=2", "torch==2.*", "torch==2.13.0+cpu", "torch~=2.13.0", "--pre", "./torch.whl", "a==1.0 b==2.0"],
)
def test_pin_check_finds_a_violation(line):
    assert len(pin_problems("requirements.txt", f"# pins\n{line}\n")) == 1


@pytest.mark.parametrize(
    "line", ["torch==2.13.0", "lm_eval[hf,math]==0.4.13", "-r requirements.txt", "a==1.0.post1", ""]
)
def test_pin_check_accepts_a_pin(line):
    assert pin_problems("requirements-dev.txt", line) == []


# ---------------------------------------------------------------------------------------------- nothing half-done


def marker_problems(path: str, text: str) -> list[str]:
    lines = enumerate(text.splitlines(), 1)
    return [f"{path}:{number}: unfinished: {line.strip()}" for number, line in lines if MARKER.search(line)]


def code_files() -> Iterable[Path]:
    """Every file of code: Python wherever it is but in hidden and cache folders, and what make and CI run."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).parts
        if not any(part.startswith(".") or part in ("build", "__pycache__") for part in parts):
            yield path
    yield from (ROOT / name for name in ("Makefile", "pyproject.toml", ".ci/run"))


def test_nothing_is_marked_unfinished():
    problems = [p for path in code_files() for p in marker_problems(str(path.relative_to(ROOT)), path.read_text())]
    assert not problems, "\n".join(problems)


def test_marker_check_finds_a_marker():
    text = f"x = 1  # {'TO' + 'DO'}: y\nmastodon = 'TODOS'\n"
    assert marker_problems("a.py", text) == [f"a.py:1: unfinished: x = 1  # {'TO' + 'DO'}: y"]


# --------------------------------------------------------------------------------------------------- public names


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def patch_problems(path: str, text: str) -> list[str]:
    """Where a test replaces a private name: what it patches may be renamed or done otherwise without any user noticing."""
    problems = []
    for node in ast.walk(ast.parse(text)):
        patches = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if not patches or node.func.attr not in ("setattr", "setitem", "delattr", "delitem"):
            continue
        target, *names = node.args[:2]
        texts = [one.value for one in (target, *names) if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        if is_private(ast.unparse(target)) or (node.func.attr.endswith("attr") and any(map(is_private, texts))):
            problems.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    return problems


def test_tests_replace_public_names_alone():
    files = sorted((ROOT / "tests").rglob("*.py"))
    problems = [p for path in files for p in patch_problems(str(path.relative_to(ROOT)), path.read_text())]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "line",
    ["m.setattr(a, '_b', 1)", "m.setattr('a._b.c', 1)", "m.setitem(a._b, 'c', 1)", "patch.setattr(a._B, 'c', 1)"],
)
def test_patch_check_finds_a_violation(line):
    assert len(patch_problems("a.py", line)) == 1


@pytest.mark.parametrize("line", ["m.setattr(a, '__init__', _b)", "m.setitem(a.b, '_c', 1)", "m.setenv('_A', 'b')"])
def test_patch_check_accepts_what_is_public(line):
    assert patch_problems("a.py", line) == []
