"""Models out, LoRA adapters out of them: what a fine-tune, or a merge, adds to its base, as the product of two thin matrices.

from adapters import LoraChoice, extract_lora

result = extract_lora("BASE", "TUNED", "OUT", LoraChoice(energy=0.95))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpoints.lazy import lazy_exports

if TYPE_CHECKING:
    from adapters.extraction import Extracted as Extracted
    from adapters.extraction import extract_lora as extract_lora
    from adapters.low_rank import LoraChoice as LoraChoice
else:
    __getattr__ = lazy_exports(
        __name__,
        {
            "Extracted": "adapters.extraction",
            "LoraChoice": "adapters.low_rank",
            "extract_lora": "adapters.extraction",
        },
    )

__all__ = ["Extracted", "LoraChoice", "extract_lora"]
