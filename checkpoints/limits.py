"""Bounds on what a config from a stranger can make us build: a file of a kilobyte may ask for a billion layers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from checkpoints.process import limited_memory

MEMORY_BYTES = 2 << 30
"""More than the largest models without their weights take, which is some hundred MB, and their code."""


@contextmanager
def limited_building(parts: int) -> Iterator[None]:
    """Let this thread make no more than `parts` modules and as many parameters, nor a command allocate much more memory.

    Raises: ValueError, MemoryError: from inside the block, where it goes beyond.
    """
    made = dict.fromkeys(("modules", "parameters"), 0)
    ours = threading.get_ident()

    def count(kind: str) -> None:
        if threading.get_ident() != ours:  # torch calls its hooks for every thread's modules
            return
        made[kind] += 1
        if made[kind] > parts:
            raise ValueError(f"more than {parts:,} {kind}, which its weight files do not hold")

    def count_module(parent: nn.Module, name: str, module: Any) -> None:
        count("modules")

    def count_parameter(parent: nn.Module, name: str, parameter: Any) -> None:
        count("parameters")

    hooks = (
        register_module_module_registration_hook(count_module),
        register_module_parameter_registration_hook(count_parameter),
    )
    try:
        with limited_memory(MEMORY_BYTES):
            yield
    finally:
        for hook in hooks:
            hook.remove()
