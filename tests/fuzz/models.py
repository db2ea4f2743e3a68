"""Tiny sound checkpoints: a base and two fine-tunes for each way of storing them, as the bytes of their files."""

from __future__ import annotations

import io
import json
import random
from functools import cache
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save
from torch import Tensor

Files = dict[str, bytes]
Family = dict[str, Files]
"""`base`, `one` and `two` -> file name -> content."""

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
BIN = "pytorch_model.bin"
WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklm", "ab", "cd", "abc", "de"]
WIDTH = 4
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "intermediate_size": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": len(WORDS),
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.6, "do_sample": True}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def shapes(rows: int) -> dict[str, tuple[int, ...]]:
    """Of every tensor of the model, with `rows` tokens."""
    layer = "model.layers.0"
    return {
        EMBEDDING: (rows, WIDTH),
        HEAD: (rows, WIDTH),
        "model.norm.weight": (WIDTH,),
        f"{layer}.self_attn.q_proj.weight": (4, WIDTH),
        f"{layer}.self_attn.k_proj.weight": (2, WIDTH),
        f"{layer}.self_attn.v_proj.weight": (2, WIDTH),
        f"{layer}.self_attn.o_proj.weight": (WIDTH, 4),
        f"{layer}.mlp.gate_proj.weight": (6, WIDTH),
        f"{layer}.mlp.up_proj.weight": (6, WIDTH),
        f"{layer}.mlp.down_proj.weight": (WIDTH, 6),
        f"{layer}.input_layernorm.weight": (WIDTH,),
        f"{layer}.post_attention_layernorm.weight": (WIDTH,),
    }


def tensors(seed: int, rows: int = len(WORDS)) -> dict[str, Tensor]:
    """Random bfloat16 weights, near those of seed 0."""
    drawn = {}
    for number, (name, shape) in enumerate(shapes(rows).items()):
        base = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        change = torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + number))
        drawn[name] = (base + 0.1 * change * bool(seed)).bfloat16()
    return drawn


def tokenizer(words: list[str]) -> Files:
    """tokenizer.json and what lies beside it. The first three words are special tokens."""
    special = [
        {"id": index, "content": word, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for index, word in enumerate(words[:3])
    ]  # fmt: skip
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: index for index, word in enumerate(words)}, "unk_token": "<unk>"},
    }  # fmt: skip
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    return {"tokenizer.json": as_json(content), "tokenizer_config.json": as_json(settings)}


def byte_pairs(extra: list[str]) -> Files:
    """vocab.json, merges.txt and added tokens, as the first models of this kind have them."""
    pieces = WORDS[1:16]  # the first merge that is applied makes what follows them
    vocab = {word: index for index, word in enumerate([*pieces, "ab", "cd"])}
    settings = {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<s>", "bos_token": "<s>", "eos_token": "</s>"}
    return {
        "vocab.json": as_json(vocab),
        "merges.txt": b"#version: 0.2\na b\nc d\n",
        "added_tokens.json": as_json({word: len(vocab) + index for index, word in enumerate(extra)}),
        "special_tokens_map.json": as_json({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>"}),
        "tokenizer_config.json": as_json(settings),
    }


@cache
def pieces(size: int) -> bytes:
    """A sentencepiece model of `size` pieces."""
    rng = random.Random(0)
    text = ["".join(rng.choices("abcde", k=rng.randrange(2, 7))) for _ in range(300)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        vocab_size=size,
        model_type="bpe",
        minloglevel=2,
        num_threads=1,
    )
    return model.getvalue()


def as_json(content: Any) -> bytes:
    """Written as transformers writes it."""
    return (json.dumps(content, indent=2) + "\n").encode()


def as_pickle(content: Any, **keywords: Any) -> bytes:
    """As torch saves it."""
    file = io.BytesIO()
    torch.save(content, file, **keywords)
    return file.getvalue()


def one_file(content: dict[str, Tensor]) -> Files:
    return {WEIGHTS: save(content, {"format": "pt"})}


def three_files(content: dict[str, Tensor]) -> Files:
    names = list(content)
    files: Files = {}
    weight_map = {}
    for number in range(3):
        own = names[number::3]
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        files[file] = save({name: content[name] for name in own}, {"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    total = sum(tensor.nbytes for tensor in content.values())
    return {**files, INDEX: as_json({"metadata": {"total_size": total}, "weight_map": weight_map})}


def side_files(**config: Any) -> Files:
    return {"config.json": as_json(CONFIG | config), "generation_config.json": as_json(GENERATION_CONFIG)}


def tied(content: dict[str, Tensor], *, store_head: bool) -> dict[str, Tensor]:
    """With the embedding as the head, stored or not."""
    rest = {name: tensor for name, tensor in content.items() if name != HEAD}
    return rest | ({HEAD: content[EMBEDDING]} if store_head else {})


@cache
def family(layout: str) -> Family:
    """The models of a layout, in the order base, one, two.

    plain: one safetensors file, the same tokenizer.json for all.
    sharded: three files and an index; head and embedding tied, and both stored by the base and one model.
    vocabularies: one file; the models have more tokens, fewer, and in another order than the base.
    pickled: pytorch_model.bin.
    byte pairs: vocab.json, merges.txt and added_tokens.json, with other added tokens in the models.
    pieces: tokenizer.model, with more pieces in the models.
    """
    seeds = {"base": 0, "one": 1, "two": 2}
    if layout in ("plain", "pickled"):
        store = one_file if layout == "plain" else lambda content: {BIN: as_pickle(content)}
        beside = {**side_files(), **tokenizer(WORDS)}
        return {name: {**store(tensors(seed)), **beside} for name, seed in seeds.items()}
    if layout == "sharded":
        beside = {**side_files(tie_word_embeddings=True), **tokenizer(WORDS)}
        return {
            name: {**three_files(tied(tensors(seed), store_head=name != "two")), **beside}
            for name, seed in seeds.items()
        }
    if layout == "vocabularies":
        words = {"base": WORDS, "one": [*WORDS, "more", "most"], "two": [*WORDS[:3], *reversed(WORDS[3:-2])]}
        return {
            name: {
                **one_file(tensors(seed, len(words[name]))),
                **side_files(vocab_size=len(words[name])),
                **tokenizer(words[name]),
            }
            for name, seed in seeds.items()
        }
    if layout == "byte pairs":
        extra = {"base": ["x", "y"], "one": ["y", "z"], "two": ["x", "y"]}
        beside = {name: byte_pairs(extra[name]) for name in seeds}
    else:
        assert layout == "pieces"
        beside = {name: {"tokenizer.model": pieces(18 if name == "base" else 20)} for name in seeds}
    config = side_files()
    return {name: {**one_file(tensors(seed)), **config, **beside[name]} for name, seed in seeds.items()}
