"""Relax a merged checkpoint by the base model's activations (activation-informed merging, AIM).

    python performAIM.py --merged_model ./merged --pretrained_model_name unsloth/llama-2-13b --omega 0.4 \\
        --save_path ./merged_AIM
    python performAIM.py --merged_model ./merged --pretrained_model_name ./base --calibration_data texts.jsonl \\
        --omegas 0,0.2,0.4 --figures ./figures --save_path ./sweep
"""

from checkpoints import early  # isort: skip # noqa: F401 - before anything that takes time to import

from checkpoints.process import end
from commands.perform_aim import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    end(main())
