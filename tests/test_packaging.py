"""What whoever installs this gets: packages with all their files, ranges that hold the tested versions, types that a checker sees."""

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from checkpoints import VERSION, early

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOORS = ("adapters", "aim", "checkpoints", "evaluation", "merging", "reports", "search")
PINNED = {
    "requirements.txt": ("evaluate", "reports"),
    "requirements-gpu.txt": ("gpu",),
    "requirements-search.txt": ("search",),
}


def pins(file: str) -> list[Requirement]:
    """The lines of a requirements file that name a package."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def ranges(extras: tuple[str, ...]) -> dict[str, Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {requirement.name.lower(): requirement for requirement in map(Requirement, lines)}


@pytest.mark.parametrize("file", PINNED)
def test_every_tested_version_is_in_its_range_and_every_range_is_tested(file):
    tested, wide = {pin.name.lower(): pin for pin in pins(file)}, ranges(PINNED[file])
    if file == "requirements.txt":
        assert tested.keys() == wide.keys()
    for name, pin in tested.items():
        (version,) = (part.version for part in pin.specifier)
        assert version in wide[name].specifier, name
        assert pin.extras == wide[name].extras, name


def test_the_citation_names_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"], citation["cff-version"]) == (VERSION, "Apache-2.0", "1.2.0")
    assert {"message", "title", "authors", "references"} <= citation.keys()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the files that git would have, built beside them."""
    here, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n"):  # fmt: skip
        if name.endswith((".py", ".json", ".jinja", ".typed", ".toml", "README.md", "LICENSE")) and "/data/" not in name and (ROOT / name).is_file():  # fmt: skip
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            (here / name).write_bytes((ROOT / name).read_bytes())
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(out)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True)
    return next(out.glob("*.whl"))


def test_a_wheel_has_every_file_of_the_packages(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    packages = [path.parent for path in ROOT.glob("*/__init__.py") if (path.parent / "py.typed").exists()]
    assert len(packages) >= 6
    files = {
        path.relative_to(ROOT).as_posix()
        for package in packages
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == files
    assert {"evaluation/results.schema.json", "checkpoints/py.typed"} <= names


def test_the_installed_commands_are_the_scripts(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (file,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        declared = dict(re.findall(r"^(\S+) = (\S+)$", archive.read(file).decode(), re.MULTILINE))
    assert declared == PROJECT["scripts"]
    assert tuple(PROJECT["scripts"]) == early.INSTALLED
    for script, (name, target) in zip(early.COMMANDS, PROJECT["scripts"].items(), strict=True):
        module, _, function = target.partition(":")
        assert getattr(importlib.import_module(module), function) is importlib.import_module(script).main, name


@pytest.mark.parametrize("name", early.INSTALLED)
def test_an_installed_command_shows_its_help_and_ends_in_one_line_while_it_imports(name: str, tmp_path: Path):
    """As the script that pip makes starts it, from another folder."""
    module, _, function = PROJECT["scripts"][name].partition(":")
    script = tmp_path / name
    script.write_text(
        f"import sys\nfrom {module} import {function}\nif __name__ == '__main__':\n    sys.exit({function}())\n"
    )

    def run(*path: Path) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
        return subprocess.run(
            [sys.executable, str(script), "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )  # fmt: skip

    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/difflib.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(20)\n"
    )
    done = run(tmp_path / "broken")
    assert (done.returncode, done.stderr) == (130, f"{name}: interrupted; nothing is left behind.\n")


@pytest.mark.parametrize("package", DOORS)
def test_what_a_type_checker_imports_is_what_python_imports(package):
    module = importlib.import_module(package)
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    typed = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed
    assert set(module.__all__) == set(typed) | ({"VERSION"} if package == "checkpoints" else set())
    for name, origin in typed.items():
        assert getattr(module, name) is getattr(importlib.import_module(origin), name)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nonsense'"):
        module.nonsense  # noqa: B018


# What each public name is to a user's type checker: a line of a program, and the type that mypy reveals.
REVEALED = {
    "adapters.extract_lora": "-> adapters.extraction.Extracted",
    "adapters.Extracted": "-> adapters.extraction.Extracted",
    "adapters.LoraChoice": "-> adapters.low_rank.LoraChoice",
    "checkpoints.open_model": "-> checkpoints.model.Model",
    "checkpoints.Model": "-> checkpoints.model.Model",
    "merging.merge": "-> streaming.job.Result",
    "merging.make_recipe": "-> merging.recipe.Recipe",
    "merging.RunOptions": "-> streaming.output.RunOptions",
    "merging.Recipe": "-> merging.recipe.Recipe",
    "search.tune": "-> search.run.Outcome",
    "search.SearchRequest": "-> search.request.SearchRequest",
    "search.Outcome": "-> search.run.Outcome",
    "aim.relax_checkpoint": "-> streaming.job.Result",
    "aim.CalibrationData": "-> aim.calibration_text.CalibrationData",
    "aim.Omega": "-> aim.omegas.Omega",
    "aim.Relaxing": "-> aim.choices.Relaxing",
    "aim.AimRequest": "-> aim.request.AimRequest",
    "aim.Calibration": "-> aim.choices.Calibration",
    "aim.CalibrationOptions": "-> aim.calibration_run.CalibrationOptions",
    "aim.read_request": "-> aim.request.AimRequest",
    "aim.perform_aim": "-> streaming.job.Result",
    "merging.Result": "-> streaming.job.Result",
    "merging.read_recipe_file": "-> merging.recipe.Recipe",
    "aim.Activations": "-> aim.activations.Activations",
    "aim.load_activations": "-> aim.activations.Activations",
    "evaluation.evaluate": "-> evaluation.run.Outcome",
    "evaluation.make_request": "-> evaluation.request.Request",
    "evaluation.Request": "-> evaluation.request.Request",
    "evaluation.Outcome": "-> evaluation.run.Outcome",
    "evaluation.BENCHMARKS": "dict[str, str]",
    "reports.compare": "-> reports.table.Table",
    "reports.load_results": "-> list[reports.entries.Entry]",
    "reports.draw": "-> reports.figures.Figures",
    "reports.hv_gain": "-> float",
    "reports.Table": "-> reports.table.Table",
    "reports.Entry": "-> reports.entries.Entry",
    "reports.Verdicts": "-> reports.bootstrap.Verdicts",
}


def test_a_users_type_checker_sees_the_public_names(tmp_path: Path):
    names = {f"{package}.{name}" for package in DOORS for name in importlib.import_module(package).__all__}
    assert names - {"checkpoints.VERSION", "checkpoints.InputError"} == set(REVEALED)
    program = [f"import {package}" for package in DOORS] + [f"reveal_type({name})" for name in REVEALED]
    (tmp_path / "user.py").write_text("\n".join(program) + "\nchk = merging.nonsense\n")
    cache = str(ROOT / ".mypy_cache")  # which `make check` has filled
    flags = ["--strict", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", cache]
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", *flags, str(tmp_path / "user.py")],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    revealed = re.findall(r'Revealed type is "(.*)"', checked.stdout)
    assert len(revealed) == len(REVEALED), checked.stdout + checked.stderr
    for (name, part), text in zip(REVEALED.items(), revealed, strict=True):
        assert part in text, (name, text)
        assert not text.endswith("Any"), (name, text)
    assert 'Module has no attribute "nonsense"' in checked.stdout
