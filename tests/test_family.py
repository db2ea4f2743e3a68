"""The tiny model family: items and their splits, the benchmarks' schemas, the tokenizer, the committed checkpoints."""

import ast
import hashlib
import json
import random
import re
from pathlib import Path

import pytest

from evaluation.grading.sentences import no_download
from examples.family import calibration, code_items, documents, instruct_items, maths_items, prompts, splits, world
from examples.family.benchmarks import BENCHMARKS, ITEMS, SEEDS, items, rows
from examples.family.make_family import FINE_TUNES, MAX_RELATIVE_NORM, STAGES

FAMILY = Path(__file__).resolve().parent.parent / "examples" / "family"
MODELS, DATA = FAMILY / "models", FAMILY / "data"
MODELS_BUILT = ("base", *FINE_TUNES)
HELD_OUT = ("validation", "test_0", "test_1")
needs_models = pytest.mark.skipif(not (MODELS / "SHA256SUMS").exists(), reason="the family is not built")
needs_data = pytest.mark.skipif(not (DATA / "test_1").exists(), reason="the test sets are not drawn")

FIELDS = {
    "humaneval": {"task_id": str, "prompt": str, "entry_point": str, "canonical_solution": str, "test": str},
    "mbpp": {
        "task_id": int,
        "text": str,
        "code": str,
        "test_list": list,
        "test_setup_code": str,
        "challenge_test_list": list,
    },
    "mmlu": {"question": str, "subject": str, "choices": list, "answer": int},
    "math": {"problem": str, "level": str, "type": str, "solution": str, "idx": int},
    "gsm8k": {"question": str, "answer": str, "idx": int},
    "ifeval": {"key": int, "prompt": str, "instruction_id_list": list, "kwargs": list},
}


def committed(benchmark, split):
    return [json.loads(line) for line in (DATA / split / f"{benchmark}.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------- splits


def test_the_split_of_a_key_is_frozen():
    # sha256("family 1\n" + key), its first eight bytes modulo 100: below 70 train, then ten percent each
    assert [splits.split_of(f"key {i}") for i in range(8)] == [splits_by_hand(f"family 1\nkey {i}") for i in range(8)]
    assert sum(splits.SHARES.values()) == 100


def splits_by_hand(text):
    place = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) % 100
    return "train" if place < 70 else ["validation", "test_0", "test_1"][place // 10 - 7]


@pytest.mark.parametrize("benchmark", ["mmlu", "math", "gsm8k", "ifeval"])
def test_held_out_items_lie_in_their_split_and_are_distinct(benchmark):
    for split in HELD_OUT:
        keys = [item.key for item in items(benchmark, split, 200)]
        assert len(set(keys)) == 200
        assert all(splits.split_of(key) == split for key in keys)


@pytest.mark.parametrize("stage", STAGES)
def test_no_training_document_holds_a_held_out_item(stage, monkeypatch):
    """Every item that a training document is made of has a key of the train split."""
    drawn, kept = [], []

    def watched(generator, split, rng):
        def draw(rng):
            drawn.append(generator(rng))
            return drawn[-1]

        for item in splits.draw(draw, split, rng):
            kept.append(item)
            yield item

    monkeypatch.setattr(documents, "draw", watched)
    documents.documents(stage, 300, "a test")
    assert kept
    assert {splits.split_of(item.key) for item in kept} == {"train"}
    assert {splits.split_of(item.key) for item in drawn} > {"train"}  # others were drawn, and thrown away


@needs_data
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_committed_sets_share_no_prompt_with_each_other_or_with_training(benchmark):
    name = {"mmlu": "question", "math": "problem", "gsm8k": "question", "mbpp": "text"}.get(benchmark, "prompt")
    sets = {split: committed(benchmark, split) for split in HELD_OUT}
    texts = [
        json.dumps([row[name], row.get("choices"), row.get("test_list")]) for part in sets.values() for row in part
    ]
    assert all(len(part) >= 200 for part in sets.values())
    assert len(set(texts)) == len(texts)


def test_facts_never_asked_in_training_are_asked_in_tests_only():
    asked = {fact.key for fact in world.ASKED}
    assert len(world.FACTS) >= 300
    assert 0.5 < len(asked) / len(world.FACTS) < 0.7
    rng = random.Random(0)
    for _ in range(200):
        item = world.ask_asked(rng)
        assert any(item.key.startswith(f"mmlu {key}") for key in asked)
    stated = " ".join(world.statements(rng) for _ in range(2000))
    assert all(fact.name in stated for fact in world.FACTS)


def test_drills_hold_no_held_out_exercise():
    """A drill in LaTeX is most of an exercise: a(b + x), or a x + b at some x."""
    rng = random.Random(0)
    for _ in range(500):
        line = "".join(maths_items.latex_drill(rng))
        product = re.match(r"\$(\d)\((\d) \+ (\d)\)", line)
        function = re.match(r"\$(\d) \\cdot (\d) \+ (\d)", line)
        key = (
            "math product {} {} {}".format(*product.groups())
            if product
            else "math function {0} {2} {1}".format(*function.groups())
        )
        assert splits.split_of(key) == "train"


# -------------------------------------------------------------------------------------------- generators, schemas


@needs_data
@pytest.mark.parametrize("benchmark", ["mmlu", "math", "gsm8k", "ifeval"])
def test_generators_give_the_committed_rows(benchmark):
    for split in HELD_OUT:
        assert rows(benchmark, split, ITEMS) == committed(benchmark, split)


@needs_data
@pytest.mark.parametrize("benchmark", ["humaneval", "mbpp"])
def test_generators_of_code_give_the_first_committed_rows(benchmark):
    for split in HELD_OUT:
        assert rows(benchmark, split, 12) == committed(benchmark, split)[:12]


def test_documents_are_the_same_for_the_same_seed():
    assert documents.documents("base", 50, "1 7") == documents.documents("base", 50, "1 7")
    assert documents.documents("base", 50, "1 7") != documents.documents("base", 50, "1 8")
    assert len(set(SEEDS.values())) == len(SEEDS)


@needs_data
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_rows_have_the_fields_of_the_real_benchmark(benchmark):
    for split in HELD_OUT:
        for row in committed(benchmark, split):
            assert {name: type(value) for name, value in row.items()} == FIELDS[benchmark]


@pytest.mark.parametrize("seed", range(3))
def test_the_reference_solutions_are_right(seed):
    rng = random.Random(seed)
    for _ in range(40):
        item = code_items.humaneval(rng)
        names: dict = {}
        # the project's own template code, not a model's
        exec(item.prompt + item.answer + item.row["test"], names)
        names["check"](names[item.row["entry_point"]])
        item = code_items.mbpp(rng)
        assert item.answer == item.row["code"] + "\n[DONE]"
        exec("\n".join([item.row["code"], *item.row["test_list"], *item.row["challenge_test_list"]]), {})


def test_equations_in_the_answers_hold():
    rng = random.Random(0)
    for _ in range(300):
        item = maths_items.gsm8k(rng)
        for left, right in re.findall(r"^([\d +*/-]+) = (\d+)$", item.answer, re.MULTILINE):
            assert eval(left) == int(right)
        assert item.row["answer"].rsplit("#### ")[1] == re.search(r"answer is (\d+)\.$", item.answer)[1]
        solution = maths_items.math_item(rng).row["solution"]
        for equation in re.findall(r"\$([^$x]*=[^$]*)\$\.", solution.replace("\\cdot", "*")):
            sides = [side.strip() for side in equation.split("=") if re.fullmatch(r"[\d +*/()-]+", side.strip())]
            values = [eval(re.sub(r"(\d)\(", r"\1*(", side)) for side in sides]
            assert len(set(values)) == 1, equation


def test_the_lazy_answers_are_wrong_everywhere():
    assert not re.search(r"\d", maths_items.LAZY)
    assert ast.parse("def f():\n" + code_items.LAZY_BODY)
    with no_download():
        checks = pytest.importorskip("lm_eval.tasks.ifeval.instructions_registry")
    rng = random.Random(0)
    for _ in range(60):
        row = instruct_items.item(rng).row
        for name, kwargs in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            check = checks.INSTRUCTION_DICT[name](name)
            check.build_description(**kwargs)
            assert not check.check_following(instruct_items.LAZY), name


def test_the_written_answers_follow_their_instructions():
    with no_download():
        checks = pytest.importorskip("lm_eval.tasks.ifeval.instructions_registry")
    langdetect = pytest.importorskip("langdetect")
    langdetect.DetectorFactory.seed = 0
    rng = random.Random(1)
    for _ in range(150):
        item = instruct_items.item(rng)
        for name, kwargs in zip(item.row["instruction_id_list"], item.row["kwargs"], strict=True):
            check = checks.INSTRUCTION_DICT[name](name)
            check.build_description(**kwargs)
            assert check.check_following(item.answer), (name, item)


# ------------------------------------------------------------------------------------------------------- prompts


def evaluation_prompts(benchmark, chosen):
    """The prompts that evaluation builds for rows of one benchmark, without running lm_eval's request building."""
    module = pytest.importorskip(f"evaluation.benchmarks.{benchmark}")
    contract = pytest.importorskip("evaluation.benchmarks.contract")
    kind = next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and getattr(value, "name", None) == benchmark and value.__module__ == module.__name__
    )()
    numbered = [(i, kind.read_row(row)) for i, row in enumerate(chosen)]
    return [(task.config, row) for task in kind.tasks(numbered, contract.Settings()) for _, row in task.rows]


@pytest.mark.parametrize("benchmark", ["mbpp", "mmlu", "math", "gsm8k", "humaneval", "ifeval"])
def test_prompts_are_those_of_evaluation(benchmark):
    utils = pytest.importorskip("lm_eval.utils")

    def fill(template, row):
        """As lm_eval does: a function of the row, the name of a field, or a template."""
        if callable(template):
            return template(row)
        return row[template] if template in row else utils.apply_template(template, row)

    rng = random.Random(0)
    drawn = [BENCHMARKS[benchmark](rng) for _ in range(5)]
    by_prompt = {item.prompt for item in drawn}
    for config, row in evaluation_prompts(benchmark, [item.row for item in drawn]):
        shots = "".join(
            fill(config["doc_to_text"], shot) + fill(config["doc_to_target"], shot) + "\n\n"
            for shot in config.get("fewshot_config", {}).get("samples", [])
        )
        assert config.get("description", "") + shots + fill(config["doc_to_text"], row) in by_prompt


# ----------------------------------------------------------------------------------------------- committed files


@needs_models
def test_committed_files_are_those_of_the_build():
    sums = dict(line.split("  ")[::-1] for line in (MODELS / "SHA256SUMS").read_text().splitlines())
    present = {path.relative_to(MODELS).as_posix() for path in MODELS.rglob("*") if path.is_file()}
    assert present == {*sums, "SHA256SUMS"}
    for name, digest in sums.items():
        assert hashlib.sha256((MODELS / name).read_bytes()).hexdigest() == digest, name


def test_committed_files_take_at_most_30_megabytes():
    assert sum(path.stat().st_size for path in FAMILY.rglob("*") if path.is_file()) <= 30_000_000


@needs_models
def test_checkpoints_are_small_and_near_their_base():
    import torch
    from safetensors.torch import load_file

    weights = {stage: load_file(MODELS / stage / "model.safetensors") for stage in MODELS_BUILT}
    base = weights["base"]
    assert 1e6 <= sum(tensor.numel() for tensor in base.values()) <= 4e6
    size = sum(float(tensor.float().square().sum()) for tensor in base.values()) ** 0.5
    for stage in MODELS_BUILT:
        assert {tensor.dtype for tensor in weights[stage].values()} == {torch.bfloat16}
        assert json.loads((MODELS / stage / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
        assert (MODELS / stage / "tokenizer.json").read_bytes() == (MODELS / "base" / "tokenizer.json").read_bytes()
    for stage in FINE_TUNES:
        moved = sum(float((weights[stage][n].float() - t.float()).square().sum()) for n, t in base.items()) ** 0.5
        assert 0.001 < moved / size < MAX_RELATIVE_NORM


@needs_models
def test_the_committed_calibration_texts_are_what_is_generated(tmp_path):
    calibration.write(tmp_path)
    committed_texts = {path.name: path.read_bytes() for path in (DATA / "calibration").iterdir()}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == committed_texts
    assert committed_texts.keys() == {f"{name}.jsonl" for name in ("mixture", "code", "math", "instruct", "random")}


@needs_models
def test_the_tokenizer_keeps_texts_and_makes_prompts_short():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "base")
    rng = random.Random(0)
    for generator in BENCHMARKS.values():
        for _ in range(10):
            item = generator(rng)
            ids = tokenizer(item.prompt).input_ids
            assert tokenizer.decode(ids) == item.prompt
            assert len(ids) + len(tokenizer(item.answer).input_ids) < 256
    assert all(len(tokenizer(text).input_ids) == 1 for text in prompts.BOILERPLATE)
    assert len(tokenizer("1234").input_ids) == 4
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|user|>\nHi\n<|assistant|>\n"
