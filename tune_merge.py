"""Find the merge that is best for some texts: method, weights, lambda, density and AIM, without a checkpoint per candidate.

    python tune_merge.py --base_model ./base --models_to_merge ./math,./code --texts math=math.jsonl,code=code.jsonl \\
        --trials 60 --study ./study --save_path ./best
    python tune_merge.py --config recipe.yml --texts math.jsonl,code.jsonl --goal loss,worst --minutes 30 --study ./study
"""

from checkpoints import early  # isort: skip # noqa: F401 - before anything that takes time to import

from checkpoints.process import end
from commands.tune_merge import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    end(main())
