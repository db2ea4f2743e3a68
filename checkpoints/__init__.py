"""What a model is on disk: the only package that opens or writes weight files.

from checkpoints import open_model

model = open_model("FOLDER")
print(model.label, len(model.weights.tensors))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpoints.lazy import lazy_exports

if TYPE_CHECKING:
    from checkpoints.errors import InputError as InputError
    from checkpoints.model import Model as Model
    from checkpoints.model import open_model as open_model
else:
    __getattr__ = lazy_exports(
        __name__,
        {"InputError": "checkpoints.errors", "Model": "checkpoints.model", "open_model": "checkpoints.model"},
    )

VERSION = "1.0.0"

__all__ = ["VERSION", "InputError", "Model", "open_model"]
