"""Chat templates come with a model, so they run where strangers' programs run: with a clock, and before the model is loaded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from checkpoints.errors import InputError, first_line
from checkpoints.settings import setting
from checkpoints.strangers import STRANGERS, StrangersError

TRIAL = [{"role": "user", "content": "What is 6 times 7?"}]
"""A chat that every template can write."""
ADVICE = f"Mend the template, or leave {setting('apply_chat_template')} out."


class TemplateFault(InputError):
    """A template that does more than refuse a chat: trying another one is of no use."""


def _render(
    conversations: list[Any],
    tools: Any = None,
    documents: Any = None,
    chat_template: str | None = None,
    return_assistant_tokens_mask: bool = False,
    **keywords: Any,
) -> tuple[list[str], list[Any]]:
    """transformers' `render_jinja_template`; the texts, and no indices of what an assistant said.

    Raises: jinja2.TemplateError: the template raises, which lm_eval answers by trying without a system message;
        TemplateFault: it takes too long, too much memory, or anything else goes wrong in it.
    """
    import jinja2

    chats = [getattr(chat, "messages", chat) for chat in conversations]
    try:
        texts = STRANGERS.ask(
            "render",
            conversations=chats,
            tools=tools,
            documents=documents,
            chat_template=chat_template,
            **{key: str(value) if type(value).__name__ == "AddedToken" else value for key, value in keywords.items()},
        )
    except StrangersError as error:
        if issubclass(getattr(jinja2.exceptions, error.kind, OSError), jinja2.TemplateError):
            raise jinja2.TemplateError(str(error)) from None
        raise TemplateFault(f"the chat template fails: {first_line(error)}. {ADVICE}") from None
    return texts, []


def check_chat_template(folder: Path, label: str, *, trust_remote_code: bool) -> None:
    """Raise InputError where a model's chat template cannot write a question: it raises, does not end, or fails otherwise."""
    from transformers import AutoTokenizer

    from evaluation.model import LOAD_ERRORS

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except LOAD_ERRORS:
        return  # which loading the model will say
    with confined(label):
        tokenizer.apply_chat_template(TRIAL, tokenize=False, add_generation_prompt=True)


@contextmanager
def confined(label: str) -> Iterator[None]:
    """Have transformers render chat templates in `checkpoints.strangers` inside the block, in every thread of the process.

    Raises: InputError: a template fails; it names the model.
    """
    from jinja2 import TemplateError

    with _renderer_replaced():
        try:
            yield
        except TemplateError as error:
            raise InputError(f"{label}: the chat template fails: {first_line(error)}. {ADVICE}") from None
        except TemplateFault as error:
            raise TemplateFault(f"{label}: {error}") from None


_lock = threading.Lock()
_inside = 0
_own: list[Any] = []


@contextmanager
def _renderer_replaced() -> Iterator[None]:
    """transformers' renderer is `_render` until the last block that wants it ends."""
    global _inside
    from transformers import processing_utils, tokenization_utils_base

    users = (vars(tokenization_utils_base), vars(processing_utils))
    with _lock:
        if not _inside:
            _own[:] = [user["render_jinja_template"] for user in users]
            for user in users:
                user["render_jinja_template"] = _render
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                for user, own in zip(users, _own, strict=True):
                    user["render_jinja_template"] = own
