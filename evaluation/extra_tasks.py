"""More lm_eval tasks by name (`--tasks_file`), exactly as lm_eval runs them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from checkpoints.errors import ArgumentError, InputError, unknown
from checkpoints.problems import Problems
from checkpoints.settings import setting

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from evaluation.model import Model


def load_tasks(names: Sequence[str]) -> TaskManager:
    """Load the tasks and their data, before any model.

    Returns: lm_eval's manager, for `run_tasks`.
    Raises: Refusals: a name that lm_eval does not know; a task that runs code without our sandbox; data that is not there.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    problems = Problems()
    for name in names:
        if name not in manager.all_tasks:
            problems.add(
                ArgumentError(f"{setting('tasks_file')}: {_short(unknown('lm_eval task', name, manager.all_tasks))}")
            )
            continue
        try:
            tasks = manager.load([name])["tasks"]
        except Exception as error:  # whatever a task's own code or its data raises
            reason = (str(error).splitlines() or [""])[0]
            problems.add(
                InputError(f"{setting('tasks_file')}: {name} cannot be loaded: {type(error).__name__}: {reason:.200}")
            )
            continue
        if any(getattr(task, "UNSAFE_CODE", False) for task in tasks.values()):
            problems.add(
                ArgumentError(
                    f"{setting('tasks_file')}: {name} runs code of the model outside our sandbox. Leave it out."
                )
            )
    problems.raise_if_any()
    return manager


def run_tasks(
    model: Model, names: Sequence[str], manager: TaskManager, *, limit: int | None, chat: bool, seed: int
) -> dict[str, Any]:
    """Evaluate tasks by lm_eval alone: its prompts, its BOS, its cutting of prompts that are too long.

    Returns: name -> `metrics` (name -> value, standard errors among them), `n`, `seconds`.
    """
    from lm_eval import simple_evaluate

    entries: dict[str, Any] = {}
    model.lm.add_bos_token = None
    if model.backend == "hf":
        model.lm.batch_size_per_gpu = model.batch_size
    for name in names:
        started = time.monotonic()
        results = simple_evaluate(
            model=model.lm,
            tasks=[name],
            task_manager=manager,
            limit=limit,
            apply_chat_template=chat,
            bootstrap_iters=1000,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
        assert results is not None
        values = results["results"].get(name, {})
        entries[name] = {
            "metrics": {key: float(value) for key, value in values.items() if isinstance(value, (int, float))},
            "n": sum(count["effective"] for count in results["n-samples"].values()),
            "seconds": round(time.monotonic() - started, 3),
        }
    return entries


def _short(message: str) -> str:
    """Without the list of lm_eval's thousands of tasks."""
    return message.partition(" Known:")[0] + " `lm_eval ls tasks` lists all."
