"""Prompts by lm_eval's request building: its templates, descriptions, examples, chat template, choices."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evaluation.benchmarks.contract import Benchmark, Row
from evaluation.benchmarks.settings import Advance, Settings

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask

# What a task wants to know about decoding; the limits of each request are set when it is sent.
_GREEDY = {"until": [], "do_sample": False}


@dataclass(frozen=True)
class Request:
    """What a model is asked for one row.

    Attributes:
        index: of the row in the benchmark's data.
        prompt: the text, chat template applied.
        instances: lm_eval's requests; one, or one for each choice.
    """

    index: int
    prompt: str
    instances: Sequence[Instance]


class _Rows(list[Row]):
    """A list that lm_eval takes for a dataset's split."""

    @property
    def features(self) -> dict[str, None]:
        return dict.fromkeys(self[0])


def build_requests(
    benchmark: Benchmark,
    rows: Sequence[tuple[int, Row]],
    settings: Settings,
    *,
    fewshots: Sequence[Row] = (),
    chat_template: Callable[..., str] | None = None,
    count_tokens: Callable[[str], int] = len,
    advance: Advance = lambda count: None,
) -> list[Request]:
    """Build the request of every row, in the order of `rows`.

    Args:
        benchmark: whose tasks build the prompts.
        rows: (index, row).
        settings: of the run.
        fewshots: rows that examples come from.
        chat_template: an lm_eval model's `apply_chat_template`; needed where `settings` ask for it.
        count_tokens: of a prompt, where a benchmark fits its examples into a number of tokens.
        advance: called with 1 for each row done.
    """
    requests = {}
    chat = benchmark.uses_chat_template(settings)
    for part in benchmark.tasks(rows, settings, fewshots):
        task = _make_task(part.config, [row for _, row in part.rows])
        for index, row in part.rows:
            row = _fit_examples(row, count_tokens)
            context = task.fewshot_context(
                row,
                num_fewshot=task.config.num_fewshot,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                chat_template=chat_template if chat else None,
                gen_prefix=task.doc_to_prefix(row),
            )
            built = task.construct_requests(
                doc=row, ctx=context, metadata=(task.config.task, index, 1), apply_chat_template=chat
            )
            instances = built if isinstance(built, list) else [built]
            requests[index] = Request(index, context, instances)
            advance(1)
    return [requests[index] for index, _ in rows]


def prompts_sha256(requests: Sequence[Request]) -> str:
    """One digest of all prompts, in order."""
    digest = hashlib.sha256()
    for request in requests:
        digest.update(hashlib.sha256(request.prompt.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()


def _make_task(config: Mapping[str, Any], rows: Sequence[Row]) -> ConfigurableTask:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.api.task import ConfigurableTask

    own = {
        "custom_dataset": lambda **keywords: {"test": _Rows(rows)},
        "test_split": "test",
        "process_results": lambda doc, results: {},
        "metric_list": [],
        **config,
    }
    if own.get("output_type", "generate_until") == "generate_until":
        own["generation_kwargs"] = dict(_GREEDY)
    task = ConfigurableTask(config=own)
    task.set_fewshot_seed(0)
    return task


def _fit_examples(row: Row, count_tokens: Callable[[str], int]) -> Row:
    """A row that offers a ladder of prompts gets the longest that fits."""
    if "ladder" not in row:
        return row
    from evaluation.benchmarks.mmlu_pro import fitting

    return {**row, "prompt": fitting(row["ladder"], count_tokens)}
