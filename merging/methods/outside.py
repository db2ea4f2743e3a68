"""Methods outside of this package: `package.module:Class`, imported by name."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
from pathlib import Path
from typing import Any

from checkpoints.errors import ArgumentError, unknown
from checkpoints.settings import setting
from merging.methods.contract import Method


def load(name: str) -> type[Method]:
    """Import a method by `package.module:Class`. Its code runs: call it for a name that the user gave or trusts.

    Raises: ArgumentError: it cannot be imported, or is no method.
    """
    where = f"{setting('method')}: {name}"
    module_name, _, class_name = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), class_name]):
        raise ArgumentError(
            f"{where}: expected package.module:Class, got {name!r}. Write the names as Python has them."
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module's own code raises
        absent = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        missing = absent is not None and module_name.startswith(absent)
        what = f"no module named {absent!r}" if missing else f"{type(error).__name__}: {error}"
        advice = "Install it, or add its folder to PYTHONPATH" if missing else "Mend the module"
        raise ArgumentError(f"{where}: expected a module that can be imported, got {what}. {advice}.") from error
    cls = getattr(module, class_name, None)
    if cls is None:
        here = [key for key, value in vars(module).items() if is_method(value)]
        raise ArgumentError(f"{where}: {unknown('class', class_name, here)}")
    if not is_method(cls):
        raise ArgumentError(
            f"{where}: expected a class derived from merging.methods.contract.Method, got {type(cls).__name__} {class_name}. "
            "See docs/adding-a-method.md."
        )
    problems = lacks(cls)
    if problems:
        raise ArgumentError(f"{where}: {' '.join(problems)} See docs/adding-a-method.md.")
    method_class: type[Method] = cls
    return method_class


def source_digest(name: str) -> str:
    """sha256 of the file that holds a method's class: a merge that was cut off is not gone on with by another formula."""
    file = inspect.getsourcefile(load(name))
    return "" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


def is_method(value: Any) -> bool:
    """Whether something is a class of a merging method."""
    return inspect.isclass(value) and issubclass(value, Method) and value is not Method


def lacks(cls: type[Method]) -> list[str]:
    """What a class lacks to be a method: a sentence each."""
    problems = []
    abstract = sorted(getattr(cls, "__abstractmethods__", ()))
    if abstract:
        problems.append(f"expected a definition of {', '.join(abstract)}, got none. Define it.")
    if "__dataclass_params__" not in vars(cls) or not vars(cls)["__dataclass_params__"].frozen:
        problems.append("expected @dataclass(frozen=True) above the class, got none. Add it.")
        return problems
    own = [field.name for field in dataclasses.fields(cls) if not field.metadata]
    if own != (["seed"] if cls.draws else []):
        problems.append(
            f"expected every field to be set to parameter(...) or shared(...){', and seed: int = 0' if cls.draws else ''}, "
            f"got {', '.join(own) or 'no seed'}."
        )
    if cls.space not in ("task_vectors", "weights"):
        problems.append(f"expected space to be task_vectors or weights, got {cls.space!r}.")
    if cls.space == "task_vectors" and not cls.reads_base:
        problems.append("expected space = 'weights' where reads_base is False, got task_vectors. Change one of them.")
    return problems
