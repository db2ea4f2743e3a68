"""Tiny models with tokenizers of every kind, whose rows say whose and which token's they are; and merges of them."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import merge
import performAIM
from checkpoints.vocabulary import read_vocabulary
from tests.scene import Scene, call

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
WORDS = ["hello", "world", "merging", "models", "tokens", "the", "quick", "brown", "fox"]
WIDTH = 8


def write_bpe(folder: Path, added: Sequence[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)  # type: ignore[call-arg]
    tokenizer.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    save_fast(tokenizer, folder, added)


def write_unigram(folder: Path, added: Sequence[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(set("".join(WORDS)) | set("▁<|>/[]_xyPAD"))
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -8.25) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram([*pieces, *(("▁" + word, -3.5) for word in WORDS)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    save_fast(tokenizer, folder, added)


def write_word_piece(folder: Path, added: Sequence[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(set("".join(WORDS)))
    pieces = ["[UNK]", "<s>", "</s>", *letters, *("##" + letter for letter in letters), *WORDS]
    tokenizer = Tokenizer(models.WordPiece({piece: row for row, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    save_fast(tokenizer, folder, added)


def save_fast(tokenizer: Any, folder: Path, added: Sequence[str]) -> None:
    tokenizer.add_special_tokens(list(added))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    write_json(folder / "tokenizer_config.json", config)


def write_sentence_piece(folder: Path, added: Sequence[str]) -> None:
    """tokenizer.model alone; added tokens as old Llama fine-tunes have them."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 50), model_writer=model, vocab_size=60, model_type="bpe", unk_id=0,
        bos_id=1, eos_id=2, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", config)
    if added:
        write_json(folder / "added_tokens.json", {token: size + row for row, token in enumerate(added)})


def write_vocab_and_merges(folder: Path, added: Sequence[str]) -> None:
    """vocab.json and merges.txt, as GPT-2 was published; added tokens in tokenizer_config.json."""
    pieces = ["<|endoftext|>", *sorted(set("".join(WORDS)) | set("Ġ<|>/[]_")), "he", "ll", "hell", "hello"]
    write_json(folder / "vocab.json", {piece: row for row, piece in enumerate(pieces)})
    (folder / "merges.txt").write_text("#version: 0.2\nh e\nl l\nhe ll\nhell o\n")
    treatment = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    decoder = {str(len(pieces) + row): {"content": token, **treatment} for row, token in enumerate(added)}
    config: dict[str, Any] = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", config | ({"added_tokens_decoder": decoder} if added else {}))


KINDS: dict[str, Callable[[Path, Sequence[str]], None]] = {
    "bpe": write_bpe,
    "unigram": write_unigram,
    "word piece": write_word_piece,
    "sentence piece": write_sentence_piece,
    "vocab and merges": write_vocab_and_merges,
}


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False))


def change_json(path: Path, **entries: Any) -> None:
    write_json(path, json.loads(path.read_text()) | entries)


def row_of(owner: str, token: str) -> float:
    """A number that bfloat16 holds, of one model's row of a token."""
    return float(zlib.crc32(f"{owner}\0{token}".encode()) % 251 - 125)


def make_model(
    folder: Path, kind: str, added: Sequence[str] = (), *, padding: int = 0, tied: bool = False, **config: Any
) -> Path:
    """A tiny model whose embedding's row of a token says whose and which token's it is; the head's is its negative."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    KINDS[kind](folder, added)
    settings = {"hidden_size": WIDTH, "num_hidden_layers": 1, "intermediate_size": 8, "num_attention_heads": 1}
    special = {"bos_token_id": 1, "eos_token_id": 2}
    write_json(folder / "config.json", {"model_type": "llama"})
    vocabulary = read_vocabulary(folder, "M")
    assert vocabulary is not None
    rows = vocabulary.size + padding
    sizes = {**settings, "vocab_size": rows, "tie_word_embeddings": tied}
    made = AutoConfig.for_model("llama", **{**sizes, **special, **config})
    model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    values = torch.full((rows,), 77.0)
    for token, index in vocabulary.ids.items():
        values[index] = row_of(folder.name, token)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(values[:, None].expand(-1, WIDTH))
        if not tied:
            model.get_output_embeddings().weight.copy_(-values[:, None].expand(-1, WIDTH))
    model.save_pretrained(folder)
    return folder


def merging_scene(folder: Path) -> Scene:
    """A folder of models, which are merged to the base, unless a method is given."""
    method = {"--method": "task_arithmetic", "--lambda": 0}
    return Scene(folder, merge, lambda given: {"--report": "none", **({} if "--method" in given else method)})


def tables(folder: Path) -> dict[str, Tensor]:
    """The embedding and the head of a model, by name."""
    tensors = load_file(folder / "model.safetensors")
    return {name: tensors[name] for name in TABLES if name in tensors}


def check_rows(folder: Path, owner_of: Callable[[str], str], count: int) -> Any:
    """Every token of a model, asked of transformers, has the row of its owner; the tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer.get_vocab()
    assert len(tokens) == len(tokenizer) == count
    assert tokens == read_vocabulary(folder, "out").ids  # type: ignore[union-attr]
    embedding, head = (tables(folder)[name] for name in TABLES)
    assert embedding.shape == head.shape
    for token, index in tokens.items():
        assert set(embedding[index].tolist()) == {row_of(owner_of(token), token)}, token
        assert set(head[index].tolist()) == {-row_of(owner_of(token), token)}, token
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == len(embedding)
    return tokenizer


def relax(base: Path, merged: Path, out: Path, *flags: str) -> dict[str, Tensor]:
    texts = out.parent / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"hello world merging models {i}"}) + "\n" for i in range(200)))
    named = ["--merged_model", merged, "--pretrained_model_name", base, "--save_path", out]
    how = ["--calibration_data", texts, "--n_samples", "8", "--block_size", "16", "--omega", "0"]
    call(performAIM, *named, *how, "--quiet", *flags)
    return load_file(out / "model.safetensors")
