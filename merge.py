"""Merge fine-tuned language models into one checkpoint.

    python merge.py --method dare_ties --base_model unsloth/llama-2-13b \\
        --models_to_merge WizardLMTeam/WizardLM-13B-V1.2,vanillaOVO/WizardMath-13B-V1.0 --save_path ./merged
    python merge.py --method ties --base_model ./base --models_to_merge ./math:0.6,./code:0.4 --density 0.3 \\
        --save_path ./merged --dry_run
    python merge.py --method my_package.my_module:MyMethod --base_model ./base --models_to_merge ./math --save_path ./merged
    python merge.py --config recipe.yml --save_path ./merged
"""

from checkpoints import early  # isort: skip # noqa: F401 - before anything that takes time to import

from checkpoints.process import end
from commands.merge import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    end(main())
