"""Bounds on what a config from a stranger can make us build: a file of a kilobyte may ask for a billion layers."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

MEMORY_BYTES = 2 << 30
"""More than the largest models without their weights take, which is some hundred MB, and their code."""


@contextmanager
def limited_building(parts: int) -> Iterator[None]:
    """Let no more than `parts` modules and as many parameters be made, nor much more memory be allocated, on Linux.

    Raises: ValueError, MemoryError: from inside the block, where it goes beyond.
    """
    made = dict.fromkeys(("modules", "parameters"), 0)

    def count(kind: str) -> None:
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
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with suppress(OSError, ValueError, IndexError):  # only Linux says how much is in use
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limits = [limit for limit in (in_use + MEMORY_BYTES, soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for hook in hooks:
            hook.remove()
