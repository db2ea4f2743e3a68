"""Make a LoRA adapter of what a fine-tuned model adds to its base.

python extract_lora.py --model ./math --base_model ./base --rank 32 --save_path ./math-lora
python extract_lora.py --model ./math --base_model ./base --energy 0.95 --modules_to_save embed_tokens,norm --save_path ./math-lora
"""

from checkpoints import early  # isort: skip # noqa: F401 - before anything that takes time to import

from checkpoints.process import end
from commands.extract_lora import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    end(main())
