"""Names of tensors as people read them: one line for what all layers have."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable


def kind_of(tensor: str) -> str:
    """The kind of layer a tensor belongs to: its name with every number replaced (`model.layers.*.mlp.up_proj.weight`)."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", tensor)


def list_kinds(names: Iterable[str]) -> str:
    """The names, or their kinds with a count where there are many."""
    kinds = Counter(kind_of(name) for name in names)
    return ", ".join(f"{kind} ({count})" if count > 1 else kind for kind, count in kinds.items())
