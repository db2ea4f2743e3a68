"""Evaluate a checkpoint on the AIM paper's six benchmarks, or grade answers that are there already.

    python evaluate_model.py --model ./DARE_TIES_AIM_InstructMathCode --profile paper --save_path results/merged.json
    python evaluate_model.py --model ./merged --benchmarks gsm8k,humaneval --limit 50 --backend hf --data_dir ./benchmarks

Programs that the model wrote run only in a sandbox. docs/evaluation.md says how each benchmark is run and what is comparable.
"""

from checkpoints import early  # isort: skip # noqa: F401 - before anything that takes time to import

from checkpoints.process import end
from commands.evaluate_model import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    end(main())
