"""mergekit in an environment of its own, to be measured on the same files.

mergekit 0.1.5 is installed as its index offers it, after torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

STEPS = (("torch==2.13.0",), ("mergekit==0.1.5", "torch==2.13.0"))
NAMED = ("mergekit", "torch", "transformers", "pydantic", "safetensors")
INSTALLED_BYTES = 2_500_000_000
LIST_METHODS = (
    "from mergekit.merge_methods.registry import registered_methods as r; print(*(one.spec.name for one in r()))"
)
LIST_VERSIONS = f"import importlib.metadata as m; print(*(f'{{n}} {{m.version(n)}}' for n in {NAMED!r}), sep=', ')"


class Mergekit:
    """mergekit below `folder`, a virtual environment that `install` makes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._marker = folder / "installed"

    @property
    def missing_bytes(self) -> int:
        """About how many bytes `install` still has to write."""
        return 0 if self._marker.is_file() else INSTALLED_BYTES

    def install(self, say: Callable[[str], object]) -> None:
        """Make the environment, unless it is there. Raises subprocess.CalledProcessError: pip says why on the terminal."""
        if self._marker.is_file():
            return
        say(f"installing mergekit into {self.folder}")
        venv.create(self.folder, with_pip=True, clear=True)
        for packages in STEPS:
            self._python("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages, out=sys.stderr)
        self._marker.touch()

    def versions(self) -> str:
        """`mergekit 0.1.5, torch 2.13.0, ...`."""
        return self._python("-c", LIST_VERSIONS).strip()

    def methods(self) -> set[str]:
        """Its merge methods, by the names that recipes use."""
        return set(self._python("-c", LIST_METHODS).split())

    def command(self, recipe: Mapping[str, Any], config: Path, out: Path, *, with_base: bool) -> list[str]:
        """Write a recipe of ours, whose keys are mergekit's, where it can read it, and give the command that runs it.

        Args:
            recipe: `Recipe.as_json()`.
            with_base: whether the method reads the base.
        """
        shown = {key: recipe[key] for key in ("merge_method", "models", "parameters")}
        shown["parameters"] = {key: value for key, value in recipe["parameters"].items() if value is not None}
        if with_base:
            shown["base_model"] = recipe["base_model"]
        config.write_text(json.dumps({**shown, "dtype": "bfloat16"}, indent=2) + "\n")  # JSON is YAML
        return [str(self.folder / "bin" / "mergekit-yaml"), str(config), str(out)]

    def _python(self, *arguments: str, out: Any = subprocess.PIPE) -> str:
        command: Sequence[str] = [str(self.folder / "bin" / "python"), *arguments]
        return subprocess.run(command, stdout=out, check=True, text=True).stdout or ""
