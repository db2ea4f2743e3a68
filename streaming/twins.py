"""Twins: loops over blocks that exist twice, in torch and compiled by numba, with the same result to the bit.

    @twin("merging.kernels")
    def add_to_base(base, delta, lambda_): ...      # in torch: the definition, and what GPUs and small merges run

A function of the same name and arguments in the named module is its compiled version; the module's `EXAMPLES` calls each once, on
any numbers. It runs in threads that have called `use_compiled`, from the moment on when the thread of `compiling` has it ready;
which of the two makes a block changes nothing in it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

from checkpoints.process import short_turns, without

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")

Key = tuple[str, str]
"""Module and name of a compiled version."""

_thread = threading.local()


class Twins:
    """Functions with a compiled version, and those that are compiled so far; a process has one set of them, below.

    Attributes:
        known: every function that `twin` has decorated.
        compiled: the compiled versions that are ready, which threads that have called `use_compiled` run.
    """

    def __init__(self) -> None:
        self.known: set[Key] = set()
        self.compiled: dict[Key, Callable[..., Any]] = {}
        self._wanted: SimpleQueue[Key | None] = SimpleQueue()
        self._asked_for: set[Key] = set()

    def twin(self, module: str) -> Callable[[Callable[Arguments, Returned]], Callable[Arguments, Returned]]:
        """Decorator of a function on CPU or GPU tensors whose compiled version, for CPU tensors, is in `module`.

        Args:
            module: by its full name; imported only to be compiled.
        """

        def decorate(plain: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
            key = module, plain.__name__
            self.known.add(key)

            @functools.wraps(plain)
            def either(*arguments: Arguments.args, **keywords: Arguments.kwargs) -> Returned:
                if not uses_compiled():
                    return plain(*arguments, **keywords)
                if key not in self.compiled and key not in self._asked_for:
                    self._asked_for.add(key)
                    self._wanted.put(key)
                run: Callable[Arguments, Returned] = self.compiled.get(key, plain)
                return run(*arguments, **keywords)

            return either

        return decorate

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Compile each twin in a background thread when it is first called; until it is ready its torch version runs.

        What was compiled once is kept in a cache on the disk. Without numba, or where it fails, the plain versions stay in use.
        """
        if not can_compile():
            yield
            return
        threading.Thread(target=self._compile_wanted, name="compiler").start()
        try:
            yield
        finally:
            self._wanted.put(None)

    def compile_all(self) -> None:
        """Compile every twin that has been imported, before anything else."""
        if can_compile():
            for key in sorted(self.known):
                self._compile(key)

    def _compile_wanted(self) -> None:
        while (key := self._wanted.get()) is not None:
            # Numba imports scipy.linalg if it is there, which takes as long as all else; no loop of ours calls it.
            with short_turns(), without("scipy.linalg"):
                self._compile(key)

    def _compile(self, key: Key) -> None:
        with suppress(Exception):  # no cache can be written, no such processor: nothing that a merge needs
            module, function = importlib.import_module(key[0]), key[1]
            module.EXAMPLES[function]()
            self.compiled[key] = getattr(module, function)


def use_compiled(use: bool) -> None:
    """Whether this thread, which must work on CPU tensors, may use what is compiled."""
    _thread.uses_compiled = use


def uses_compiled() -> bool:
    """Whether this thread may use what is compiled."""
    return bool(getattr(_thread, "uses_compiled", False))


def can_compile() -> bool:
    """Whether numba is there, and not switched off, which would have its loops run uncompiled."""
    return importlib.util.find_spec("numba") is not None and os.environ.get("NUMBA_DISABLE_JIT", "0") == "0"


TWINS = Twins()
twin, compiling, compile_all = TWINS.twin, TWINS.compiling, TWINS.compile_all
