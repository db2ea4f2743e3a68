"""A package's public names, imported when they are first used, so that `--help` needs neither torch nor the engine."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping


def lazy_exports(package: str, modules: Mapping[str, str]) -> Callable[[str], object]:
    """The `__getattr__` of a package whose public names come from its modules.

        if TYPE_CHECKING:
            from merging.merge_work import merge as merge
        else:
            __getattr__ = lazy_exports(__name__, {"merge": "merging.merge_work"})

    Type checkers read the imports, Python the mapping; a test holds the two to each other.

    Args:
        package: its name, for messages.
        modules: public name -> the module that has it.
    """

    def get(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(importlib.import_module(modules[name]), name)

    return get
