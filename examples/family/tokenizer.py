"""The family's tokenizer: byte-level BPE with single digits, the benchmarks' fixed texts as one token each, a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from examples.family import prompts
from examples.family.documents import ASSISTANT, USER, documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 1024
END, PAD = "<|endoftext|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}" + ASSISTANT + "\n{{ message.content }}" + END + "\n"
    "{% else %}" + USER + "\n{{ message.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}" + ASSISTANT + "\n{% endif %}"
)
WINDOW = 512


def train_tokenizer(folder: Path, samples: int = 12000) -> None:
    """Learn the merges from the pretraining mixture and save the tokenizer in Hugging Face's format."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [END, PAD, USER, ASSISTANT]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(prompts.BOILERPLATE),
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = []
    for document in documents("pretrain", samples, "tokenizer"):
        for text in document[:2]:
            for fixed in prompts.BOILERPLATE:
                text = text.replace(fixed, "\0")
            texts += text.split("\0")
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in prompts.BOILERPLATE])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        bos_token=END,
        pad_token=PAD,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that was saved with a model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
