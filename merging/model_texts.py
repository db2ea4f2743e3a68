"""Texts of each model's own task, as tokens: what the inputs of its weights are looked at with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints.errors import InputError, first_line
from checkpoints.model import Model
from checkpoints.settings import setting
from checkpoints.strangers import STRANGERS, StrangersError
from checkpoints.text_files import read_rows

LONGEST = 2048
"""Tokens of a document; what is beyond is cut off."""


@dataclass(frozen=True)
class ModelText:
    """What one model is run on.

    Attributes:
        documents: token ids of each, `[1, tokens]` int64.
    """

    documents: tuple[torch.Tensor, ...]

    @classmethod
    def joined(cls, texts: Sequence[ModelText]) -> ModelText:
        """Several as one."""
        return cls(tuple(document for text in texts for document in text.documents))

    @property
    def tokens(self) -> int:
        """How many in all."""
        return sum(document.numel() for document in self.documents)

    def documents_on(self, device: torch.device) -> list[torch.Tensor]:
        """The documents, on a device."""
        return [document.to(device) for document in self.documents]

    def digest(self) -> str:
        """sha256 of the token ids."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(document.numpy().tobytes() + b"|")
        return digest.hexdigest()


def read_model_text(model: Model, source: str, tokens: int) -> ModelText:
    """Read a model's text: its documents in order, until there are so many tokens.

    A row is a text, or an object with `text`, or with `prompt` and `answer`, which the model's chat template puts together.

    Args:
        source: a .jsonl, .json, .txt or .parquet file, or .gz of one.
        tokens: after how many no further document is begun.

    Raises: InputError: no such file, rows of another kind, no tokenizer or chat template, no text.
    """
    return text_of_rows(read_rows(_found(model, source)), model, setting("model_data", source), tokens)


def text_of_rows(rows: Iterable[Any], model: Model, where: str, tokens: int) -> ModelText:
    """See `read_model_text`; of rows that have been read, `where` naming them in messages."""
    tokenizer = tokenizer_of(model)
    documents: list[torch.Tensor] = []
    count = 0
    for number, row in enumerate(rows, 1):
        ids = _encode(row, tokenizer, model, f"{where}: row {number}")[:LONGEST]
        if ids:
            documents.append(torch.tensor([ids], dtype=torch.int64))
            count += len(ids)
        if count >= tokens:
            break
    if not documents:
        raise InputError(f"{where}: expected texts of {model.label}'s own task, got none. Give another file.")
    return ModelText(tuple(documents))


def read_examples(model: Model, source: str, tokens: int) -> list[tuple[torch.Tensor, int]]:
    """Examples of a task, as `read_model_text` reads them: token ids `[1, tokens]`, and where the answer begins, at least 1.

    All of a text but its first token is its answer. Examples whose answer is cut off or empty are left out.
    """
    tokenizer = tokenizer_of(model)
    examples = []
    rows = iter(read_rows(_found(model, source)))
    for document in read_model_text(model, source, tokens).documents:
        row = next(row for row in rows if not _is_empty(row))
        begin = 1
        if isinstance(row, dict) and not isinstance(row.get("text"), str):
            asked = render_chat([{"role": "user", "content": row["prompt"]}], tokenizer, model, begin_answer=True)
            begin = max(1, len(tokenizer.encode(asked, add_special_tokens=False)))
        if begin < document.shape[1]:
            examples.append((document, begin))
    if not examples:
        raise InputError(
            f"{setting('model_data', source)}: expected examples with answers, got none of at most {LONGEST} tokens. Give another file."
        )
    return examples


def _is_empty(row: Any) -> bool:
    """Whether a row gives no document: a text of nothing."""
    text = row.get("text") if isinstance(row, dict) else row
    return isinstance(text, str) and not text.strip()


def _found(model: Model, source: str) -> Path:
    """A file that is there."""
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(
            f"{setting('model_data', source)}: no such file. Give a file of texts of {model.label}'s own task."
        )
    return path


def check_tokens(text: ModelText, model: Model, base: Model, *, is_merged: bool) -> None:
    """Refuse a text whose tokens are others to the base: the merge's embedding would answer something else.

    Args:
        text: in the model's tokens.
        is_merged: whether the merge itself runs on it, which has the base's tokens alone.

    Raises: InputError.
    """
    if model.vocabulary_digest == base.vocabulary_digest or model.vocabulary is None or base.vocabulary is None:
        return
    own, known = ({index: token for token, index in one.vocabulary.ids.items()} for one in (model, base))  # type: ignore[union-attr]
    for index in sorted({int(index) for document in text.documents for index in document.flatten()}):
        there = known.get(index)
        if there == own.get(index) or (there is None and not is_merged):
            continue
        raise InputError(
            f"{model.label}: expected the tokenizer of {base.label}, got another: token {index} is {own.get(index)!r:.60} here and "
            f"{'none' if there is None else repr(there)[:60]} there. Merge models of one tokenizer, or use another method."
        )


def tokenizer_of(model: Model) -> Any:
    """A model's tokenizer. Raises InputError: it has none that can be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            model.tokenizer_folder, local_files_only=True, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # a tokenizer's own code fails in every way there is
        reason = first_line(error) if model.vocabulary_digest else "there is none"
        raise InputError(
            f"{model.label}: expected a tokenizer, which reading its text needs: {reason}. Add its tokenizer files."
        ) from error


def _encode(row: Any, tokenizer: Any, model: Model, where: str) -> list[int]:
    """Token ids of one row."""
    fields: Mapping[str, Any] = row if isinstance(row, dict) else {"text": row}
    if isinstance(fields.get("text"), str):
        text = fields["text"].strip()
        return list(tokenizer.encode(text)) if text else []
    if all(isinstance(fields.get(key), str) for key in ("prompt", "answer")):
        chat = [
            {"role": "user", "content": fields["prompt"]},
            {"role": "assistant", "content": fields["answer"]},
        ]
        return list(tokenizer.encode(render_chat(chat, tokenizer, model), add_special_tokens=False))
    got = ", ".join(sorted(map(str, fields))) if isinstance(row, dict) else type(row).__name__
    raise InputError(f"{where}: expected a text, or the fields text, or prompt and answer, got {got}. Mend the row.")


def render_chat(chat: Sequence[Mapping[str, str]], tokenizer: Any, model: Model, *, begin_answer: bool = False) -> str:
    """A chat as the model's template writes it, which may be a stranger's program and runs apart.

    Args:
        begin_answer: write what comes before an answer, too.

    Raises: InputError: there is no template, or it fails.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise InputError(
            f"{model.label}: expected a chat template, which rows of prompt and answer need, got none. Give rows of text, or add a template."
        )
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    try:
        (text,) = STRANGERS.ask(
            "render", conversations=[list(chat)], chat_template=template, add_generation_prompt=begin_answer, **special
        )
    except StrangersError as error:
        raise InputError(
            f"{model.label}: the chat template fails: {first_line(error)}. Mend it, or give rows of text."
        ) from None
    return str(text)
