"""Compile loops (`streaming.loops`) with LLVM, which comes with numba, for the processor that this runs on."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from typing import Any

import torch

Loop = Callable[[int, int, int], int]
"""Takes the address, number and bytes of jobs and returns FINE, NOT_FINITE or NOT_READ; Python's lock is free meanwhile."""


def can_compile() -> bool:
    """Whether LLVM is there, and compiled loops are not switched off, as numba's are."""
    return importlib.util.find_spec("llvmlite") is not None and os.environ.get("NUMBA_DISABLE_JIT", "0") == "0"


def address_of_pread() -> int:
    """The C library's `pread`, whose offsets have 64 bits; 0 where there is none."""
    try:
        library = ctypes.CDLL(None)
        function = getattr(library, "pread64", None) or library.pread
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def has_instructions_for(dtypes: Iterable[torch.dtype]) -> bool:
    """Whether the processor widens and rounds these dtypes, and multiplies and adds in one step, by itself."""
    needed = {"fma", *(("f16c",) if torch.float16 in dtypes else ())}
    return platform.machine().lower() in ("aarch64", "arm64") or needed <= _features()


@cache
def _features() -> frozenset[str]:
    if not can_compile():
        return frozenset()
    import llvmlite.binding as llvm

    return frozenset(name for name, there in llvm.get_host_cpu_features().items() if there)


_SIGNATURE = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


class Compiler:
    """Compiles loops, one at a time, and keeps what it has compiled: a process has one, below."""

    def __init__(self) -> None:
        self._loops: dict[Any, Loop | None] = {}
        self._lock = threading.Lock()
        self._kept: list[Any] = []
        self._machine: Any = None

    def get(self, key: Any, text: Callable[[], str]) -> Loop | None:
        """The loop of a key, compiled first where it is not; None where it cannot be, such as on a processor that LLVM does not know.

        Args:
            key: equal for equal texts.
            text: makes LLVM's language of it (`streaming.loops.write_loop`).
        """
        with self._lock:
            if key not in self._loops:
                self._loops[key] = None
                with suppress(Exception):  # then torch makes every block
                    self._loops[key] = self._compile(text())
            return self._loops[key]

    def _compile(self, text: str) -> Loop:
        import llvmlite.binding as llvm

        if self._machine is None:
            llvm.initialize_native_target()
            llvm.initialize_native_asmprinter()
            target = llvm.Target.from_default_triple()
            self._machine = target.create_target_machine(
                cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2
            )
        module = llvm.parse_assembly(text)
        module.verify()
        options = llvm.create_pipeline_tuning_options(speed_level=1)
        options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
        llvm.create_pass_builder(self._machine, options).getModulePassManager().run(
            module, llvm.create_pass_builder(self._machine, options)
        )
        engine = llvm.create_mcjit_compiler(module, self._machine)
        engine.finalize_object()
        loop: Loop = _SIGNATURE(engine.get_function_address("loops"))
        self._kept.append(engine)
        return loop


COMPILER = Compiler()
