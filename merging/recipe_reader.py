"""Read a recipe file's content key by key into a `Recipe`, and collect every problem with its place in the file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from alignment.layout import NEW_TOKEN_ROWS, Layout, TokenRow
from checkpoints.errors import ArgumentError, InputError, named_by, unknown
from checkpoints.location import ModelName, parse_model
from checkpoints.problems import Problems
from checkpoints.settings import Remark, setting
from merging.methods import METHODS, canonical, get_method, is_outside, parameters_by_key
from merging.methods.contract import Method
from merging.parameters import REQUIRED
from merging.recipe import (
    OUT_DTYPES,
    ModelInput,
    Recipe,
    Slice,
    check_count,
    check_expression,
    class_of,
    source_key,
    twice,
)
from merging.recipe_documents import Documents
from streaming.values import Value, describe, parse_value

KEYS = (
    "merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "pad_to_multiple_of", "new_token_rows", "chat_template", "copy_tokenizer_from", "allow_config_difference", "tie_word_embeddings", "tokens", "exclude", "only",
    "seed", "aim",
)  # fmt: skip
RECORD_KEYS = (
    "schema", "inputs", "outputs", "side_files", "versions", "command", "notes", "warnings", "report", "identity",
)  # fmt: skip
"""What merge_recipe.json has besides: it says what came of the recipe, and is passed over."""
NOT_SUPPORTED = {
    "residual_weight": "mergekit reads it and does nothing with it. Leave it out",
}
INT8_MASK = "int8_mask has no effect: it says how masks are stored, and changes no number."


class Reader:
    """Reads one file, collecting what is wrong with it.

    Args:
        where: the file, for messages.
        trust_remote_code: import a method that the file names as `package.module:Class`.
        documents: the merges that can be used as models.
    """

    def __init__(self, where: str, *, trust_remote_code: bool = False, documents: Documents | None = None):
        self.where = where
        self.documents = documents
        self.trust_remote_code = trust_remote_code
        self.is_unread = False  # a method whose parameters nobody knows, as it was not imported
        self.problems = Problems()
        self.notes: list[str] = []
        self.pinned: dict[str, str] = {}
        self.method = ""

    def refuse(self, place: str, problem: str) -> None:
        """Note a problem at a place in the file (`models[1].parameters.density`)."""
        self.problems.add(ArgumentError(f"{self.where}: {place}: {problem}" if place else f"{self.where}: {problem}"))

    def note(self, text: str) -> None:
        """Note something once."""
        if Remark(text) not in self.notes:
            self.notes.append(Remark(text))

    # ------------------------------------------------------------------------------------------------- the whole file

    def read(self, content: Any, flags: Mapping[str, Any]) -> Recipe | None:
        """The recipe; None where problems keep it from being made."""
        if not isinstance(content, dict):
            self.refuse("", f"expected keys such as merge_method and models, got {describe(content)}. Give a recipe.")
            return None
        # Its keys; a merge_recipe.json has more, and pins revisions.
        is_record = "schema" in content
        if content.get("name") is not None:
            self.note(f"name has no effect: {setting('save_path')} names the merge.")
        self.check_keys("", content, (*KEYS, "name", *RECORD_KEYS) if is_record else (*KEYS, "name"))
        content = self.unwrap(content)
        if is_record:
            self.pinned = revisions(content.get("inputs"))
        # Method and base, then what is merged.
        cls = self.read_method(content)
        base = None if content.get("base_model") is None else self.read_model("base_model", content["base_model"])
        if cls is not None and content.get("base_model") is None:
            try:
                cls = class_of(self.method, False)
            except ArgumentError as error:
                self.refuse("", error.marked)
                cls = None
        shared = self.read_values("parameters", content.get("parameters"), shared=True)
        slices = self.read_slices(content, cls, base)
        # What flags may say too, as long as they agree.
        seed = self.agree("seed", self.read_seed(content.get("seed"), cls), flags["seed"])
        out_dtype = self.agree("out_dtype", self.read_dtypes(content), flags["out_dtype"]) or "auto"
        exclude = self.agree("exclude", self.read_text("exclude", content.get("exclude")), flags["exclude"])
        check_expression(f"{self.where}: exclude", exclude, self.problems)
        only = self.agree("only", self.read_text("only", content.get("only")), flags["only"])
        check_expression(f"{self.where}: only", only, self.problems)
        layout = self.read_layout(content, flags["layout"])
        aim = content.get("aim")
        if aim is not None and not isinstance(aim, dict):
            self.refuse("aim", f"expected keys such as omega, got {describe(aim)}.")
        if flags["seed"] is not None and cls is not None and not cls.draws:
            self.problems.add(ArgumentError(f"{setting('seed')}: {self.method} draws no random numbers. Leave it out."))
        if self.problems or cls is None:
            return None
        recipe = Recipe(
            merge_method=self.method,
            base_model=base,
            slices=slices,
            parameters=shared,
            seed=(seed or 0) if cls.draws else None,
            out_dtype=out_dtype,
            exclude=exclude,
            only=only,
            layout=layout,
            aim=aim,
            notes=tuple(self.notes),
            places=self.places(content, flags),
        )
        return self.with_defaults(recipe, cls)

    def places(self, content: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, str]:
        """Setting -> where the file gives it, of those that nothing beside the file gives."""
        names = {"merge_method": "method", "dtype": "out_dtype", "tokenizer": "tokenizer_source"}
        beside = {**flags, **flags["layout"]}
        places = {}
        for key, value in content.items():
            name = names.get(key, key)
            if value is not None and beside.get(name) is None:
                places[name] = f"{self.where}: {key}"
        shared = content.get("parameters")
        if isinstance(content.get("tokenizer"), dict) and "tokens" in content["tokenizer"]:
            places["tokens"] = f"{self.where}: tokenizer.tokens"
        places["model_data"] = f"{self.where}: models: data"
        for key in shared if isinstance(shared, dict) else ():
            places[str(key)] = f"{self.where}: parameters.{key}"
        return places

    def check_keys(self, place: str, content: Mapping[Any, Any], known: Iterable[str]) -> None:
        """Refuse keys that mean nothing, naming the nearest that does."""
        for key in content:
            if key in known:
                continue
            if key in NOT_SUPPORTED:
                self.refuse(_join(place, key), f"is not supported: {NOT_SUPPORTED[key]}.")
            else:
                self.refuse(place, unknown("key", str(key), known))

    def unwrap(self, content: dict[str, Any]) -> dict[str, Any]:
        """The recipe without `modules`, in which newer versions of mergekit wrap the slices of a model's one part."""
        modules = content.get("modules")
        if modules is None:
            return content
        if not isinstance(modules, dict) or len(modules) != 1 or not isinstance(next(iter(modules.values())), dict):
            self.refuse(
                "modules", "expected one, default. Merge models of several parts whole: name them under models."
            )
            return content
        ((name, module),) = modules.items()
        self.check_keys(f"modules.{name}", module, ("models", "slices", "parameters"))
        inner = {key: module[key] for key in ("models", "slices") if key in module}
        for key in inner.keys() & content.keys():
            self.refuse(f"modules.{name}", f"{key} is given beside modules too. Leave one of the two out.")
        shared = [part for part in (content.get("parameters"), module.get("parameters")) if part is not None]
        if all(isinstance(part, dict) for part in shared):
            inner["parameters"] = {key: value for part in shared for key, value in part.items()}
        else:
            self.refuse(f"modules.{name}.parameters", "expected parameters such as weight.")
        return {**content, **inner}

    def read_method(self, content: Mapping[str, Any]) -> type[Method] | None:
        """The class of the method."""
        name = content.get("merge_method")
        if not isinstance(name, str):
            self.refuse(
                "merge_method", f"expected the name of a method, got {describe(name)}. Known: {', '.join(METHODS)}."
            )
            return None
        if is_outside(name) and not self.trust_remote_code:
            self.is_unread = True
            self.refuse(
                "merge_method",
                f"expected the name of a method, got {name}, Python code that is not part of this program. If you know and "
                f"trust it, add {setting('trust_remote_code')}.",
            )
            return None
        try:
            cls = get_method(name)
        except ArgumentError as error:
            self.refuse("merge_method", error.marked.removeprefix(f"{setting('method')}: "))
            return None
        self.method = canonical(name)
        return cls

    def with_defaults(self, recipe: Recipe, cls: type[Method]) -> Recipe | None:
        """The recipe with every default written out, so that it means the same wherever it is read."""
        shared, slices = dict(recipe.parameters), list(recipe.slices)
        for key, (parameter, _) in cls.parameters().items():
            default = parameter.default_in_files
            if key in shared or default is None:
                continue
            if parameter.per_model and default is not REQUIRED:
                slices = [
                    replace(
                        part,
                        sources=tuple(
                            replace(source, parameters={**source.parameters, key: Value.constant(default)})
                            if key not in source.parameters and key not in part.parameters
                            else source
                            for source in part.sources
                        ),
                    )
                    for part in slices
                ]
            elif all(_says(part, key) for part in slices):
                continue
            elif default is REQUIRED:
                self.refuse(
                    "parameters",
                    f"{key}: {self.method} needs it: a number, a list of numbers over the layers, or filters.",
                )
            else:
                shared[key] = Value.constant(default)
        return None if self.problems else replace(recipe, parameters=shared, slices=tuple(slices))

    def agree(self, key: str, said: Any, flag: Any) -> Any:
        """What the file says, and what is said beside it, where they do not contradict each other."""
        if flag is None or said is None or flag == said:
            return said if flag is None else flag
        self.problems.add(ArgumentError(f"{setting(key)}: {self.where} says {key}: {said}. Leave one of the two out."))
        return said

    # --------------------------------------------------------------------------------------------- models and slices

    def read_slices(
        self, content: Mapping[str, Any], cls: type[Method] | None, base: ModelName | None
    ) -> tuple[Slice, ...]:
        """What is merged: `models`, or `slices`."""
        models, slices = content.get("models"), content.get("slices")
        if (models is None) == (slices is None):
            self.refuse(
                "", f"expected models or slices, got {'neither' if models is None else 'both'}. Give one of them."
            )
            return ()
        if models is not None:
            sources = [
                self.read_source(place, entry, ("model", "parameters", "data"), cls)
                for place, entry in self.entries("models", models)
            ]
            known = [source for source in sources if source is not None]
            return (self.make_slice("models", known, {}, cls, base),) if len(known) == len(sources) and known else ()
        parts = []
        for place, entry in self.entries("slices", slices):
            if not isinstance(entry, dict):
                self.refuse(place, f"expected the key sources, got {describe(entry)}.")
                continue
            self.check_keys(place, entry, ("sources", "parameters"))
            keys = ("model", "layer_range", "parameters")
            listed = self.entries(f"{place}.sources", entry.get("sources"))
            sources = [self.read_source(inner, one, keys) for inner, one in listed]
            own = self.read_values(f"{place}.parameters", entry.get("parameters"), shared=True)
            known = [source for source in sources if source is not None]
            if known and len(known) == len(sources):
                parts.append(self.make_slice(place, known, own, cls, base))
        return tuple(parts)

    def entries(self, place: str, content: Any) -> list[tuple[str, Any]]:
        """A list's entries with their places."""
        if not isinstance(content, list) or not content:
            self.refuse(place, f"expected a list with at least one entry, got {describe(content)}.")
            return []
        return [(f"{place}[{index}]", entry) for index, entry in enumerate(content)]

    def read_source(
        self, place: str, entry: Any, keys: Sequence[str], cls: type[Method] | None = None
    ) -> ModelInput | None:
        """One model with its parameters, its layers in a slice, and its text where the method `cls` needs it."""
        if not isinstance(entry, dict) or "model" not in entry:
            self.refuse(
                place,
                f"expected the key model, got {', '.join(map(str, entry)) if isinstance(entry, dict) else describe(entry)}.",
            )
            return None
        self.check_keys(place, entry, (*keys, "revision"))
        name = self.read_model(f"{place}.model", entry["model"])
        if entry.get("revision") is not None and name is not None:
            name = self.with_revision(f"{place}.revision", name, entry["revision"])
        parameters = self.read_values(f"{place}.parameters", entry.get("parameters"), shared=False)
        layers = None
        if "layer_range" in keys:
            layers = self.read_layers(f"{place}.layer_range", entry.get("layer_range"))
        data = self.read_text(f"{place}.data", entry.get("data"))
        if data is not None and cls is not None and not cls.needs_data:
            self.note(f"{place}.data has no effect: {self.method} does not use it.")
            data = None
        return None if name is None else ModelInput(name, parameters, layers, data)

    def read_layers(self, place: str, content: Any) -> tuple[int, int] | None:
        """`[first, one after the last]`."""
        is_pair = isinstance(content, list) and len(content) == 2 and all(type(part) is int for part in content)
        if is_pair and 0 <= content[0] < content[1] <= 1_000_000:
            return content[0], content[1]
        self.refuse(
            place, f"expected [FIRST, END], the first layer and the one after the last, got {describe(content)}."
        )
        return None

    def read_model(self, place: str, content: Any) -> ModelName | None:
        """A model by name, or as mergekit spells one out: `{model: {path: ..., revision: ...}, lora: ...}`."""
        text = _model_text(content)
        if text is not None and self.documents is not None and text in self.documents:
            return self.documents.model(text)
        if text is None:
            self.refuse(place, f"expected a folder or the name of a model, got {describe(content)}.")
            return None
        try:
            name = parse_model(text)
        except InputError as error:
            self.refuse(place, error.marked)
            return None
        if name.base is not None and self.documents is not None and str(name.base) in self.documents:
            self.refuse(
                place, f"{name}: an adapter cannot be put on {name.base}, a merge of this recipe. Write that one first."
            )
            return None
        if name.revision is None and not name.is_local and text in self.pinned:
            return replace(name, revision=self.pinned[text])
        return name

    def with_revision(self, place: str, name: ModelName, revision: Any) -> ModelName | None:
        """A hub model at the revision that stands beside it; of an adapter on a base, the base is what is meant to have one."""
        if not isinstance(revision, str):
            self.refuse(place, f"expected a branch, a tag or a commit, got {describe(revision)}.")
        elif name.merged is not None or name.is_local:
            what = "a merge of this recipe" if name.merged is not None else "a local folder"
            self.refuse(place, f"{name} is {what}, which has no revisions. Leave it out.")
        elif name.base is not None:
            self.refuse(place, f"{name} is two models. Write NAME@REVISION for each of them.")
        elif name.revision not in (None, revision) and name.path_or_id not in self.pinned:
            self.refuse(place, f"{name} has a revision already. Leave one of the two out.")
        else:
            return self.read_model(place, f"{name.path_or_id}@{revision}")
        return None

    def make_slice(
        self,
        place: str,
        listed: Sequence[ModelInput],
        own: Mapping[str, Value],
        cls: type[Method] | None,
        base: ModelName | None,
    ) -> Slice:
        """A slice of what the file lists: the base is no model of its own where the method works against it."""
        for name in twice(source.name for source in listed):
            self.refuse(place, f"{name} is named twice. Give it once, with the sum of its weights.")
        is_sliced = place != "models"
        lengths = {source.layers[1] - source.layers[0] for source in listed if source.layers}
        if len(lengths) > 1:
            self.refuse(
                place,
                f"expected as many layers of each model, got {', '.join(map(str, sorted(lengths)))}. Name equally many.",
            )
        if cls is None:
            return Slice(tuple(listed), own)
        bases = [source for source in listed if base is not None and source_key(source.name) == source_key(base)]
        against_base = base is not None and cls.reads_base
        if (
            is_sliced
            and len(listed) == 1
            and ((cls.space == "weights" and not cls.additive) or (against_base and bases))
        ):
            return Slice(tuple(listed), own, as_is=True)
        sources = [source for source in listed if not (against_base and source in bases)]
        base_layers = None
        if against_base and is_sliced:
            ranges = {source.layers for source in (bases or sources)}
            base_layers = ranges.pop() if len(ranges) == 1 else None
            if base_layers is None:
                self.refuse(
                    place, f"expected {base} among the sources, to know which of its layers belong here. Add it."
                )
        if cls.needs_data:
            if is_sliced:
                self.refuse(place, f"{self.method} merges whole models, which it runs. Name them under models.")
            for source in sources:
                if source.data is None and not is_sliced:
                    self.refuse(
                        place,
                        f"{source.name}: {self.method} needs text of the model's own task. Add the key data, a file.",
                    )
        try:
            check_count(cls, self.method, len(sources))
        except ArgumentError as error:
            self.refuse(place, error.marked)
        return Slice(tuple(sources), own, base_layers, bool(bases) and against_base)

    # -------------------------------------------------------------------------------------------------------- values

    def read_values(self, place: str, content: Any, *, shared: bool) -> dict[str, Value]:
        """The parameters at one place that the method uses; what it does not use is noted, what nobody knows refused."""
        if content is None:
            return {}
        if not isinstance(content, dict):
            self.refuse(place, f"expected parameters such as weight, got {describe(content)}.")
            return {}
        used = get_method(self.method).parameters() if self.method else {}
        known = {*parameters_by_key(), *used, "int8_mask"}
        values: dict[str, Value] = {}
        for key, content_of_key in content.items():
            if key == "int8_mask":
                self.note(INT8_MASK)
            elif self.is_unread:
                continue
            elif key not in known:
                self.refuse(place, unknown("parameter", str(key), sorted(known)))
            elif content_of_key is None or not self.method:
                continue
            elif key not in used:
                self.note(f"{place}.{key} has no effect: {self.method} does not use it.")
            elif not shared and not used[key][0].per_model:
                self.note(f"{place}.{key} has no effect: it holds for all models. Write it under parameters.")
            else:
                try:
                    values[key] = parse_value(content_of_key, used[key][0])
                except ArgumentError as error:
                    self.refuse(f"{place}.{key}", error.marked)
        return values

    # ------------------------------------------------------------------------------------------------- the other keys

    def read_seed(self, content: Any, cls: type[Method] | None) -> int | None:
        if content is None or type(content) is int:
            if content is not None and cls is not None and not cls.draws:
                self.note(f"seed has no effect: {self.method} draws no random numbers.")
                return None
            return content
        self.refuse("seed", f"expected a whole number, got {describe(content)}.")
        return None

    def read_dtypes(self, content: Mapping[str, Any]) -> str | None:
        """The output's dtype: `out_dtype`, else `dtype`, as in mergekit."""
        read: dict[str, str | None] = {}
        for key in ("dtype", "out_dtype"):
            text = self.read_text(key, content.get(key))
            read[key] = None if text is None else text.removeprefix("torch.")
            if read[key] is not None and read[key] not in OUT_DTYPES:
                self.refuse(key, unknown("dtype", str(text), OUT_DTYPES))
        if read["dtype"] not in (None, "auto", "float32"):
            self.note(
                f"dtype {read['dtype']}: the arithmetic is float32 in any case"
                + ("; out_dtype says what is written." if read["out_dtype"] else f", and {read['dtype']} is written.")
            )
        return read["out_dtype"] or read["dtype"]

    def read_text(self, key: str, content: Any) -> str | None:
        if content is None or isinstance(content, str):
            return content
        self.refuse(key, f"expected text, got {describe(content)}.")
        return None

    def read_layout(self, content: Mapping[str, Any], flags: Mapping[str, Any]) -> Layout:
        """The keys of vocabulary, head and side files, from the file and from flags."""
        before = len(self.problems)
        source, further = self.read_vocabulary(content)
        if len(self.problems) > before:
            return Layout()
        said = {**further, "tokenizer_source": source}
        agreed = {key: self.agree(key, said.get(key), flags.get(key)) for key in {*said, *flags}}
        try:
            with named_by(self.places(content, {"layout": flags})):
                return Layout(**{key: value for key, value in agreed.items() if value is not None})
        except InputError as error:
            self.problems.add(error)
            return Layout()

    def read_tokens(self, place: str, content: Any) -> tuple[TokenRow, ...]:
        """Where the rows of tokens come from: token -> `source` (a model, or how mergekit spells one), `force`."""
        if not isinstance(content, dict):
            self.refuse(place, f"expected tokens with their source, got {describe(content)}.")
            return ()
        rows = []
        for token, entry in content.items():
            where = f"{place}.{token}"
            if not isinstance(token, str) or not isinstance(entry, dict) or "source" not in entry:
                self.refuse(where, f"expected the key source, got {describe(entry)}.")
                continue
            self.check_keys(where, entry, ("source", "force"))
            force, source = entry.get("force", False), entry["source"]
            if not isinstance(force, bool):
                self.refuse(f"{where}.force", f"expected true or false, got {describe(force)}.")
                continue
            if not isinstance(source, dict) or "kind" not in source:
                model = self.read_model(f"{where}.source", source)
                rows += [TokenRow(token, str(model), None, force)] if model is not None else []
                continue
            kind = source["kind"]
            if kind not in ("zero", "model_token"):
                self.refuse(f"{where}.source.kind", unknown("kind", str(kind), ("zero", "model_token")))
                continue
            self.check_keys(f"{where}.source", source, ("kind", "model", "token", "token_id"))
            if kind == "zero":
                rows.append(TokenRow(token, None, None, force))
                continue
            model = self.read_model(f"{where}.source.model", source.get("model"))
            which = [source[key] for key in ("token", "token_id") if source.get(key) is not None]
            if len(which) > 1 or not all(map(_is_text_or_number, which)):
                self.refuse(f"{where}.source", "expected token, a text, or token_id, a number. Give one of them.")
            elif model is not None:
                rows.append(TokenRow(token, str(model), which[0] if which else None, force))
        return tuple(rows)

    def read_vocabulary(self, content: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """`tokenizer_source` or `tokenizer`, None where neither is there, and the keys of vocabulary and side files beside it."""
        further = {
            key: content[key]
            for key in (
                *("pad_to_multiple_of", "new_token_rows", "tie_word_embeddings"),
                *("chat_template", "copy_tokenizer_from", "allow_config_difference"),
            )
            if content.get(key) is not None
        }
        if content.get("tokens") is not None:
            further["tokens"] = self.read_tokens("tokens", content["tokens"])
        # `tokenizer` says the same in more words.
        source, place = content.get("tokenizer_source"), "tokenizer_source"
        detailed = content.get("tokenizer")
        if detailed is not None:
            if source is not None:
                self.refuse("tokenizer", "tokenizer_source is given too. Leave one of the two out.")
            if not isinstance(detailed, dict):
                self.refuse("tokenizer", f"expected keys such as source, got {describe(detailed)}.")
                return None, {}
            self.check_keys("tokenizer", detailed, ("source", "pad_to_multiple_of", "tokens"))
            if detailed.get("tokens") is not None:
                if content.get("tokens") is not None:
                    self.refuse("tokenizer.tokens", "tokens is given too. Leave one of the two out.")
                further["tokens"] = self.read_tokens("tokenizer.tokens", detailed["tokens"])
            source, place = detailed.get("source", "union"), "tokenizer.source"
            if detailed.get("pad_to_multiple_of") is not None:
                further["pad_to_multiple_of"] = detailed["pad_to_multiple_of"]
        # The values of the other keys.
        multiple = further.get("pad_to_multiple_of", 1)
        if type(multiple) is not int or multiple < 1:
            self.refuse("pad_to_multiple_of", f"expected a whole number above 0, got {describe(multiple)}.")
        for key in ("chat_template", "copy_tokenizer_from", "allow_config_difference"):
            self.read_text(key, further.get(key))
        choices: dict[str, Sequence[Any]] = {"new_token_rows": NEW_TOKEN_ROWS, "tie_word_embeddings": (True, False)}
        for key, allowed in choices.items():
            if key in further and further[key] not in allowed:
                self.refuse(
                    key,
                    f"expected {' or '.join(str(value).lower() for value in allowed)}, got {describe(further[key])}.",
                )
        # Whose tokenizer: a word, or a model.
        if source is None or source in ("base", "union", "auto"):
            return source, further
        if isinstance(source, str):
            source = source.removeprefix("model:")  # as older recipes have it
        return str(self.read_model(place, source)), further


def _is_text_or_number(content: Any) -> bool:
    return isinstance(content, str) or type(content) is int


def _model_text(content: Any) -> str | None:
    """`NAME@REVISION+LORA` of a model, however it is spelt."""
    if isinstance(content, str):
        return content
    if not isinstance(content, dict):
        return None
    if "path" in content and set(content) <= {"path", "revision"} and isinstance(content["path"], str):
        return content["path"] if content.get("revision") is None else f"{content['path']}@{content['revision']}"
    if "model" in content and set(content) <= {"model", "lora"}:
        model, lora = _model_text(content["model"]), content.get("lora")
        adapter = None if lora is None else _model_text(lora)
        return model if lora is None or model is None or adapter is None else f"{model}+{adapter}"
    return None


def revisions(inputs: Any) -> dict[str, str]:
    """Of merge_recipe.json: hub name -> commit it was merged from, of named merges' inputs too."""
    entries = inputs if isinstance(inputs, list) else []
    inner = (revisions(entry.get("inputs")) for entry in entries if isinstance(entry, dict) and "inputs" in entry)
    return {name: commit for found in inner for name, commit in found.items()} | {
        entry["model"]: entry["revision"]
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("model"), str) and isinstance(entry.get("revision"), str)
    }


def _says(part: Slice, key: str) -> bool:
    """Whether a slice says a parameter's value, for all of its sources or for each; or needs none, being taken as it is."""
    return part.as_is or key in part.parameters or all(key in source.parameters for source in part.sources)


def _join(place: str, key: Any) -> str:
    return f"{place}.{key}" if place else str(key)
