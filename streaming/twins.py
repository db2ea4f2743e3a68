"""Twins: loops over blocks that exist twice, in torch and compiled by numba, with the same result to the bit.

    @twin("merging.kernels")
    def add_to_base(base, delta, lambda_): ...      # in torch: the definition, and what GPUs and small merges run

A function of the same name and arguments in the named module is its compiled version. It runs in threads that have called
`use_compiled`, from the moment on when `start_compiling` has it ready; which of the two makes a block changes nothing in it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")

_compiled: dict[tuple[str, str], Callable[..., Any]] = {}
_modules: set[str] = set()
_thread = threading.local()
_lock = threading.Lock()
_compilers: dict[str, threading.Thread] = {}


def twin(module: str) -> Callable[[Callable[Arguments, Returned]], Callable[Arguments, Returned]]:
    """Decorator of a function on CPU or GPU tensors whose compiled version, for CPU tensors, is in `module`.

    Args:
        module: by its full name; imported only to be compiled. Its `warm_up()` calls each of its functions once, on any
            numbers, and yields the name of each when it has.
    """
    _modules.add(module)

    def decorate(plain: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
        key = module, plain.__name__

        @functools.wraps(plain)
        def either(*arguments: Arguments.args, **keywords: Arguments.kwargs) -> Returned:
            chosen = _compiled.get(key, plain) if getattr(_thread, "uses_compiled", False) else plain
            return chosen(*arguments, **keywords)

        return either

    return decorate


def use_compiled(use: bool) -> None:
    """Whether this thread, which must work on CPU tensors, may use what is compiled."""
    _thread.uses_compiled = use


def start_compiling() -> None:
    """Compile the twins of every function that has been imported, while the plain versions are at work.

    What was compiled once is kept in a cache on the disk. Without numba, or where it fails, the plain versions stay in use.
    """
    if importlib.util.find_spec("numba") is None or os.environ.get("NUMBA_DISABLE_JIT", "0") != "0":
        return
    with _lock:
        for module in sorted(_modules - _compilers.keys()):
            _compilers[module] = threading.Thread(target=_compile, args=[module], name=f"compiler of {module}")
            _compilers[module].start()


def compile_all() -> None:
    """As `start_compiling`, and wait for it."""
    start_compiling()
    for thread in _compilers.values():
        thread.join()


def _compile(name: str) -> None:
    with suppress(Exception):  # no cache can be written, no such processor: nothing that a merge needs
        module = importlib.import_module(name)
        for function in module.warm_up():
            _compiled[name, function] = getattr(module, function)
