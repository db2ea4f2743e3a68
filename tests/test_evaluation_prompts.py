"""Prompts: those of lm_eval's own tasks to the byte, and the published one for MATH and GSM8K."""

import logging
from pathlib import Path

import pytest

from evaluation.benchmarks import BENCHMARKS, get_benchmark
from evaluation.benchmarks.settings import Settings
from evaluation.prompts import build_requests, prompts_sha256
from tests.evaluation_files import rows_of

FIXED, PAPER, CHAT = Settings(), Settings(profile="paper"), Settings(chat=True)


def read(name):
    benchmark = get_benchmark(name)
    source = "mmlu_stem" if name == "mmlu" else name
    return benchmark, list(enumerate(benchmark.read_row(row) for row in rows_of(source)))


def template(messages, add_generation_prompt=True):
    """A chat template in plain sight: <role>content, open where a message is to be continued."""
    text = "".join(f"<{message['role']}>{message['content']}</>" for message in messages)
    return text + "<assistant>" if add_generation_prompt else text.removesuffix("</>")


def stock(path, rows, *, chat=False, **override):
    """(prompt, settings) that lm_eval's own task builds for rows; the scoring parts of its YAML are left out."""
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    from evaluation.benchmarks.mbpp_examples import EXAMPLES
    from evaluation.prompts import _Rows

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / path, resolve_func=False)
    config |= {"process_results": lambda doc, results: {}, "metric_list": [], "filter_list": None, "unsafe_code": False}
    config |= {"custom_dataset": lambda **keywords: {config["test_split"]: _Rows(rows), "dev": _Rows(rows)}}
    for key in ("dataset_path", "dataset_name", "include"):
        config.pop(key, None)
    if "samples" in config.get("fewshot_config", {}):
        config["fewshot_config"] = {"sampler": "first_n", "samples": EXAMPLES}
    task = ConfigurableTask(config={**config, **override})
    prompts = []
    for row in rows:
        shots = task.config.num_fewshot or 0
        keywords = {
            "apply_chat_template": chat,
            "fewshot_as_multiturn": chat,
            "chat_template": template if chat else None,
        }
        context = task.fewshot_context(row, num_fewshot=shots, gen_prefix=task.doc_to_prefix(row), **keywords)
        built = task.construct_requests(doc=row, ctx=context, metadata=("", 0, 1), apply_chat_template=chat)
        prompts.append([instance.args for instance in (built if isinstance(built, list) else [built])])
    return prompts


STOCK = {"humaneval": "humaneval/humaneval.yaml", "mbpp": "mbpp/mbpp.yaml", "ifeval": "ifeval/ifeval.yaml"}
INSTRUCT = {
    "humaneval": "humaneval/humaneval_instruct.yaml",
    "mbpp": "mbpp/mbpp_instruct.yaml",
    "ifeval": STOCK["ifeval"],
}


@pytest.mark.parametrize("name", STOCK)
def test_prompts_are_those_of_lm_eval(name):
    benchmark, rows = read(name)
    expected = stock(STOCK[name], [row for _, row in rows])
    requests = build_requests(benchmark, rows, FIXED)
    assert [request.prompt for request in requests] == [built[0][0] for built in expected]
    assert [request.index for request in requests] == [index for index, _ in rows]


@pytest.mark.parametrize("name", INSTRUCT)
@pytest.mark.parametrize("profile", ["fixed", "paper"])
def test_prompts_with_a_chat_template_are_those_of_lm_eval(name, profile):
    """Profile fixed uses the instruct tasks; paper, as its program did, the plain ones."""
    benchmark, rows = read(name)
    files = INSTRUCT if profile == "fixed" else STOCK
    expected = stock(files[name], [row for _, row in rows], chat=True)
    requests = build_requests(benchmark, rows, Settings(profile=profile, chat=True), chat_template=template)
    assert [request.prompt for request in requests] == [built[0][0] for built in expected]


@pytest.mark.parametrize("chat", [False, True])
def test_mmlu_requests_are_those_of_lm_eval(chat):
    benchmark, rows = read("mmlu")
    requests = build_requests(benchmark, rows, CHAT if chat else FIXED, chat_template=template)
    for subject in ("astronomy", "high_school_physics", "machine_learning"):
        chosen = [position for position, (_, row) in enumerate(rows) if row["subject"] == subject]
        path = f"mmlu/default/mmlu_{subject}.yaml"
        expected = stock(path, [rows[position][1] for position in chosen], chat=chat, fewshot_split="dev")
        for position, built in zip(chosen, expected, strict=True):
            assert [instance.args for instance in requests[position].instances] == built


def test_mmlu_prompt():
    """One prompt, written out."""
    benchmark, rows = read("mmlu")
    index = next(position for position, (_, row) in enumerate(rows) if row["subject"] == "high_school_physics")
    row = rows[index][1]
    prompt = build_requests(benchmark, [rows[index]], FIXED)[0].prompt
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", row["choices"], strict=True))
    start = "The following are multiple choice questions (with answers) about high school physics.\n\n"
    assert prompt == f"{start}{row['question'].strip()}\n{choices}Answer:"


@pytest.mark.parametrize(("name", "field"), [("gsm8k", "question"), ("math", "problem")])
def test_wcot_prompt(name, field):
    benchmark, rows = read(name)
    source = rows_of(name)
    for settings in (FIXED, PAPER, CHAT):
        prompts = [request.prompt for request in build_requests(benchmark, rows, settings, chat_template=template)]
        assert prompts == [
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            f"\n\n### Instruction:\n{row[field].strip()}\n\n### Response: Let's think step by step."
            for row in source
        ]


def test_limits_and_stop_strings():
    """The table of the paper's settings."""
    settings = {name: get_benchmark(name).generation(PAPER) for name in BENCHMARKS}
    assert settings["mmlu"] is None
    limits = {name: generation.max_new_tokens for name, generation in settings.items() if generation}
    assert limits == {"humaneval": 1024, "mbpp": 256, "math": 1024, "gsm8k": 1024, "ifeval": 1280, "mmlu_pro": 2048}
    assert settings["humaneval"].stop == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    assert settings["mbpp"].stop == ("[DONE]",)
    assert settings["math"] == settings["gsm8k"]
    assert settings["gsm8k"].stop == ("</s>", "<|im_end|>", "<|endoftext|>", "\n\nQuestion:")
    assert settings["ifeval"].stop == ()
    assert get_benchmark("mbpp").generation(FIXED).max_new_tokens == 512
    without_bos = [name for name in BENCHMARKS if get_benchmark(name).adds_no_bos(PAPER)]
    assert without_bos == ["humaneval", "mbpp", "mmlu", "ifeval"]
    assert not any(get_benchmark(name).adds_no_bos(FIXED) for name in BENCHMARKS)


def pro_row(question, category="math", options=("1", "2", "N/A"), answer="B", worked=""):
    return {
        "question": question,
        "options": list(options),
        "answer": answer,
        "category": category,
        "cot_content": worked,
    }


def test_mmlu_pro_leaves_examples_out_until_the_prompt_fits():
    benchmark = get_benchmark("mmlu_pro")
    row = benchmark.read_row(pro_row("1 + 1?"))
    examples = [pro_row(f"example {n}", worked=f"A: Let's think step by step. {n}.") for n in range(6)]
    examples.insert(0, pro_row("other", category="law", worked="A: Let's think step by step. No."))
    read_examples = [benchmark.read_row(example) for example in examples]

    def prompt(count_tokens):
        return build_requests(benchmark, [(0, row)], FIXED, fewshots=read_examples, count_tokens=count_tokens)[0].prompt

    full = prompt(lambda text: 0)
    assert full.count("Question:\n") == 6
    assert "example 4" in full
    assert "example 5" not in full
    assert "other" not in full
    assert full.endswith("Question:\n1 + 1?\nOptions:\nA. 1\nB. 2\nAnswer: Let's think step by step.")
    assert "Answer: Let's think step by step. 0.\n\n" in full
    assert prompt(lambda text: 500 * text.count("Question:\n")).count("Question:\n") == 4
    assert prompt(lambda text: 9999).count("Question:\n") == 1


def test_the_digest_of_prompts_sees_every_prompt():
    benchmark, rows = read("gsm8k")
    requests = build_requests(benchmark, rows, FIXED)
    digest = prompts_sha256(requests)
    assert digest == prompts_sha256(build_requests(benchmark, rows, PAPER))
    assert digest != prompts_sha256(requests[:-1])
    assert digest != prompts_sha256(list(reversed(requests)))
