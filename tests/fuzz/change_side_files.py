"""Changes to configs and tokenizers."""

from __future__ import annotations

import random
from typing import Any

import sentencepiece.sentencepiece_model_pb2 as sentencepiece_model

from tests.fuzz.change_json import Unfit, dress, dump, edit, parse, set_entries, spoil, spoil_text
from tests.fuzz.models import Files, as_json, tokenizer

CONFIG = "config.json"
SETTINGS: dict[str, list[Any]] = {
    "model_type": ["gpt2", "qwen2", "mixtral", "gemma2", "bert", "t5", "mamba", "clip", "llava", "LLAMA", "nope", "", None, 3],
    "architectures": [[], None, ["LlamaModel"], ["GPT2LMHeadModel"], ["os"], ["AutoModel"], "LlamaForCausalLM", [None], [3], {}],
    "num_hidden_layers": [0, -1, 2, 1000, 10**5, 10**9, 2**63, "1", 1.0, None, True],
    "hidden_size": [0, 5, 2**40, -4, "4", 1e9],
    "num_attention_heads": [0, 3, 4, -2, None],
    "num_key_value_heads": [0, 3, None, 10**9],
    "head_dim": [2, 0, None, -1, 3],
    "vocab_size": [0, 19, 10**12, -1, None, "20", 20.0],
    "tie_word_embeddings": [True, None, "false", 0, []],
    "auto_map": [{"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, [], "x", {"AutoConfig": "a/b--evil.C"}],
    "quantization_config": [{}, {"quant_method": "gptq"}, "awq", {"quant_method": None}, [], True],
    "rope_scaling": [{"type": "yarn", "factor": 2}, {"rope_type": "x"}, "x", [], {"factor": "nan"}],
    "rope_parameters": [{}, {"rope_type": "linear"}, 3],
    "text_config": [{}, {"model_type": "llama"}, None, "x", {"vocab_size": 7}],
    "layer_types": [[], ["full_attention"], ["x"] * 3, "full_attention"],
    "hidden_act": ["nope", None, "relu", 3],
    "torch_dtype": ["float32", "float64", "int8", "x", None, 3],
    "dtype": ["float16", {"a": "float32"}, "auto"],
    "configuration_files": [["../one/config.1.0.0.json"], ["config.1.0.0.json"], "x", [3]],
    "_attn_implementation": ["flash_attention_2", "a/b", "paged|a/b@x", 3],
    "transformers_version": ["99.0", None, "x"],
    "pad_token_id": [-1, 10**9, "x", [0]],
    "is_encoder_decoder": [True, "x"],
    "torchscript": [True],
    "num_labels": [10**7, -1],
    "id2label": [{"0": "a"}, [], {"x": 1}],
    "_name_or_path": ["../../x", 3],
    "base_model_tp_plan": [{"x": "y"}, 3],
    "attention_bias": [True, "x"],
    "mlp_bias": [True],
    "initializer_range": ["x", float("nan")],
    "rms_norm_eps": ["x", None],
}  # fmt: skip
HARMLESS: dict[str, list[Any]] = {
    "_name_or_path": ["/somewhere/else", "org/model"],
    "transformers_version": ["4.20.0", "5.0.0"],
    "note": ["x", None, 1.5, {"a": [1, 2]}, "é\n", float("inf")],
    "eos_token_id": [2, [2, 3]],
    "use_cache": [False, True],
}


def dress_config(rng: random.Random, files: Files) -> None:
    name = rng.choice([CONFIG, CONFIG, "generation_config.json"])
    files[name] = dress(rng, parse(files[name]))


def harmless_setting(rng: random.Random, files: Files) -> None:
    config = parse(files[CONFIG])
    key = rng.choice(list(HARMLESS))
    config[key] = rng.choice(HARMLESS[key])
    files[CONFIG] = as_json(config)


def other_generation_config(rng: random.Random, files: Files) -> None:
    """Whatever it says, a merge hands it on."""
    content = parse(files["generation_config.json"])
    spoil(rng, content)
    files["generation_config.json"] = dump(content)


def edit_config(rng: random.Random, files: Files) -> None:
    files[CONFIG] = edit(rng, files[CONFIG])


def odd_setting(rng: random.Random, files: Files) -> None:
    config = parse(files[CONFIG])
    if not isinstance(config, dict):
        raise Unfit
    files[CONFIG] = set_entries(rng, config, SETTINGS)


def config_text(rng: random.Random, files: Files) -> None:
    files[CONFIG] = spoil_text(rng, files[CONFIG])


def lose_a_config(rng: random.Random, files: Files) -> None:
    del files[
        rng.choice([name for name in (CONFIG, "generation_config.json", "tokenizer_config.json") if name in files])
    ]


CONFIGS = (
    {change.__name__: change for change in (dress_config, harmless_setting, other_generation_config)},
    {change.__name__: change for change in (edit_config, odd_setting, config_text, lose_a_config)},
)


def tokenizer_files(files: Files) -> list[str]:
    """The files that a tokenizer is made of."""
    sides = ("tokenizer", "vocab", "merges", "added", "special")
    return sorted(name for name in files if name.startswith(sides))


def words(files: Files) -> list[str]:
    """The tokens of a tokenizer.json in the order of their ids. Raises Unfit where there is none."""
    if "tokenizer.json" not in files:
        raise Unfit
    tree = parse(files["tokenizer.json"])
    try:
        vocab: dict[str, int] = tree["model"]["vocab"]
        return sorted(vocab, key=lambda word: vocab[word])
    except (TypeError, KeyError, AttributeError):
        raise Unfit from None


def dress_tokenizer(rng: random.Random, files: Files) -> None:
    name = rng.choice([name for name in tokenizer_files(files) if name.endswith(".json")] or [""])
    if not name:
        raise Unfit
    files[name] = dress(rng, parse(files[name]))


def shuffle_words(rng: random.Random, files: Files) -> None:
    """The same tokens under other ids; the special ones stay."""
    there = words(files)
    files.update(tokenizer([*there[:3], *rng.sample(there[3:], len(there) - 3)]))


def other_words(rng: random.Random, files: Files) -> None:
    """Some tokens replaced by others, some left out."""
    there = words(files)
    kept = [word if rng.random() < 0.8 else f"new{at}" for at, word in enumerate(there[3:])]
    files.update(tokenizer([*there[:3], *kept[: rng.randrange(3, len(kept) + 1)]]))


def other_pieces(rng: random.Random, files: Files) -> None:
    """A piece of a sentencepiece model renamed, or with another score."""
    model = pieces_of(files)
    piece = rng.choice(list(model.pieces)[5:])
    if rng.random() < 0.5:
        piece.score -= rng.random()
    else:
        piece.piece = f"new{rng.randrange(10**6)}"
    files["tokenizer.model"] = model.SerializeToString()


def pieces_of(files: Files) -> Any:
    """tokenizer.model as its fields. Raises Unfit where there is none."""
    if "tokenizer.model" not in files:
        raise Unfit
    model = sentencepiece_model.ModelProto()
    try:
        model.ParseFromString(files["tokenizer.model"])
    except Exception:
        raise Unfit from None
    return model


def odd_pieces(rng: random.Random, files: Files) -> None:
    """Fields of a sentencepiece model that do not fit together."""
    model = pieces_of(files)
    if not len(model.pieces):
        raise Unfit
    piece = rng.choice(list(model.pieces))
    what = rng.randrange(7)
    if what == 0:
        piece.type = rng.choice([1, 2, 3, 4, 5, 6])
    elif what == 1:
        piece.piece = rng.choice([model.pieces[0].piece, "", "<0x00>", "<s>", "\0", "x" * 3000])
    elif what == 2:
        piece.score = rng.choice([float("nan"), float("inf"), -1e38])
    elif what == 3:
        model.trainer_spec.model_type = rng.choice([1, 2, 3, 4])
    elif what == 4:
        model.trainer_spec.unk_id = rng.choice([-1, 5, 10**6])
    elif what == 5:
        model.normalizer_spec.precompiled_charsmap = bytes(rng.randrange(256) for _ in range(rng.randrange(40)))
    else:
        del model.pieces[rng.randrange(len(model.pieces)) :]
    files["tokenizer.model"] = model.SerializeToString()


def edit_tokenizer(rng: random.Random, files: Files) -> None:
    name = rng.choice([name for name in tokenizer_files(files) if name.endswith(".json")] or [""])
    if not name:
        raise Unfit
    files[name] = edit(rng, files[name])


def edit_tokens(rng: random.Random, files: Files) -> None:
    """Tokens and ids of tokenizer.json, where they matter to a merge."""
    if "tokenizer.json" not in files:
        raise Unfit
    tree = parse(files["tokenizer.json"])
    try:
        spoil(rng, rng.choice([tree["model"]["vocab"], tree["added_tokens"], tree["model"]]))
    except (KeyError, TypeError):
        raise Unfit from None
    files["tokenizer.json"] = dump(tree)


def odd_tokenizer_setting(rng: random.Random, files: Files) -> None:
    settings = parse(files.get("tokenizer_config.json", b"{}"))
    if not isinstance(settings, dict):
        raise Unfit
    options: dict[str, list[Any]] = {
        "tokenizer_class": ["LlamaTokenizer", "BertTokenizer", "T5Tokenizer", "Nope", "", None, 3, "os.system", "PreTrainedTokenizer"],
        "auto_map": [{"AutoTokenizer": ["evil.Tokenizer", None]}, ["a", "b"], "x", {"AutoTokenizer": "a/b--evil.T"}],
        "vocab_file": ["../one/vocab.json", "/dev/zero", 3],
        "merges_file": ["../one/merges.txt", 3],
        "tokenizer_file": ["../one/tokenizer.json", "/etc/passwd", None],
        "fast_tokenizer_files": [["../one/tokenizer.1.0.0.json"], ["tokenizer.1.json"], "x", 3, [3]],
        "added_tokens_decoder": [{"0": {"content": "x"}}, {"x": 1}, {"999999": {"content": "z", "special": True}}, []],
        "extra_special_tokens": [{"a": "<a>"}, ["<b>"], 3],
        "additional_special_tokens": [["<a>"], "x", [3]],
        "unk_token": [None, 3, {"content": "u", "__type": "AddedToken"}, {"__type": "os"}],
        "chat_template": ["{{ 1/0 }}", 3, [{"name": "x", "template": "y"}]],
        "model_max_length": [10**40, -1, "x"],
        "sp_model_kwargs": [{"model_file": "/etc/passwd"}, 3],
        "backend": ["tokenizers", "sentencepiece", "mistral_common", 3],
        "legacy": [True, "x"],
        "init_inputs": [["../x"], 3, [[]]],
    }  # fmt: skip
    files["tokenizer_config.json"] = set_entries(rng, settings, options)


def tokenizer_text(rng: random.Random, files: Files) -> None:
    name = rng.choice(tokenizer_files(files))
    files[name] = spoil_text(rng, files[name])


def lose_a_tokenizer_file(rng: random.Random, files: Files) -> None:
    del files[rng.choice(tokenizer_files(files))]


TOKENIZERS = (
    {change.__name__: change for change in (dress_tokenizer, shuffle_words, other_words, other_pieces)},
    {
        change.__name__: change
        for change in (
            odd_pieces, edit_tokenizer, edit_tokens, odd_tokenizer_setting, tokenizer_text, lose_a_tokenizer_file,
        )
    },
)  # fmt: skip
