"""Every text class of transformers as a tiny model, merged and relaxed and held against a measurement that knows nothing of the watch.

make architectures                 # all of them, and docs/architectures.md
python -m tests.architectures.sweep --only zamba2 MllamaForConditionalGeneration
"""
