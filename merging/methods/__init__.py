"""The merging methods, one file each, which brings everything that is to be known of it. Importing this package imports no torch.

`METHODS` is found in the files of this folder: every class with a `name` of its own is a method. Their declarations are
read from the source, so that `--help` lists methods and parameters at once.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from checkpoints.errors import ArgumentError, unknown
from checkpoints.settings import setting
from merging import parameters as declarations
from merging.parameters import SHARED, Parameter

if TYPE_CHECKING:
    from merging.methods.contract import Method

PACKAGE = "merging.methods"


class Entry(NamedTuple):
    """What is known of a method before its class is imported.

    Attributes:
        target: `module:Class`, the module in this package.
        parameters: recipe key -> parameter.
        draws: whether it draws random numbers.
        needs_data: whether each model brings text of its own task.
    """

    target: str
    parameters: dict[str, Parameter]
    draws: bool
    needs_data: bool


@cache
def _classes(module: str) -> dict[str, dict[str, Any]]:
    """The classes of a file of this package: name -> what their fields are set to, those of their bases first.

    A `parameter(...)` or `shared(...)` is a dataclass field, a constant its value; nothing else is read.
    """
    tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
    known: dict[str, dict[str, Any]] = {}
    classes: dict[str, dict[str, Any]] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
            imported = _classes((node.module or "").rpartition(".")[2])
            known |= {alias.name: imported[alias.name] for alias in node.names if alias.name in imported}
        if isinstance(node, ast.ClassDef):
            inherited = [known.get(base.id, {}) for base in node.bases if isinstance(base, ast.Name)]
            fields = {key: value for base in reversed(inherited) for key, value in base.items() if key != "name"}
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value is not None:
                    value = _value(line.value)
                    if value is not None:
                        fields[line.target.id] = value
            known[node.name] = classes[node.name] = fields
    return classes


def _value(node: ast.expr) -> Any:
    """A declaration's dataclass field, or a constant; None for anything else."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("parameter", "shared"):
        return eval(compile(ast.Expression(node), PACKAGE, "eval"), dict(vars(declarations)))  # our own source
    return None


def _find() -> dict[str, Entry]:
    methods = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        for cls, fields in {} if path.stem in ("__init__", "contract") else _classes(path.stem).items():
            if fields.get("name"):
                declared = [value.metadata["parameter"] for value in fields.values() if hasattr(value, "metadata")]
                parameters = {parameter.key: parameter for parameter in declared}
                methods[fields["name"]] = Entry(
                    f"{path.stem}:{cls}", parameters, fields.get("draws", False), fields.get("needs_data", False)
                )
    return dict(sorted(methods.items()))


METHODS = _find()
"""Name in recipes and flags -> what is known of the method, in the order of the names."""


def is_outside(name: str) -> bool:
    """Whether a method's name is `package.module:Class`, a class outside of this package."""
    return ":" in name


def canonical(name: str) -> str:
    """The name as recipes store it: in lower case, but for a class outside of this package."""
    return name if is_outside(name) else name.lower()


def get_method(name: str) -> type[Method]:
    """The class of a method.

    Args:
        name: a key of METHODS in any case, or `package.module:Class`, whose module is imported: its code runs.

    Raises: ArgumentError: there is no such method, naming the nearest one; or the class cannot be imported, or lacks something.
    """
    if is_outside(name):
        from merging.methods.outside import load

        return load(name)
    if name.lower() not in METHODS:
        raise ArgumentError(f"{setting('method')}: {unknown('method', name, METHODS)}")
    module, _, cls = METHODS[name.lower()].target.partition(":")
    method_class: type[Method] = getattr(importlib.import_module(f"{PACKAGE}.{module}"), cls)
    return method_class


def parameters_by_key(more: Iterable[tuple[str, Parameter]] = ()) -> dict[str, list[tuple[str, Parameter]]]:
    """Recipe key -> the methods that have such a parameter and what it is for each, shared ones first.

    Args:
        more: (method, parameter) of methods outside of this package.
    """
    users: dict[str, list[tuple[str, Parameter]]] = {key: [] for key in SHARED}
    for method, parameter in [
        *((name, parameter) for name, entry in METHODS.items() for parameter in entry.parameters.values()),
        *more,
    ]:
        users.setdefault(parameter.key, []).append((method, parameter))
    return users
