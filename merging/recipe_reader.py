"""Read a recipe file's content key by key into a `Recipe`, and collect every problem with its place in the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from alignment.layout import Layout
from checkpoints.errors import ArgumentError, InputError, named_by, unknown
from checkpoints.settings import setting
from merging.methods import METHODS, canonical, get_method, is_outside
from merging.methods.contract import Method
from merging.parameters import REQUIRED
from merging.recipe import (
    OUT_DTYPES,
    Recipe,
    Slice,
    check_expression,
    class_of,
)
from merging.recipe_pieces import Pieces
from merging.recipe_slices import read_slices
from merging.recipe_vocabulary import read_vocabulary
from streaming.values import Value, describe

KEYS = (
    "merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "pad_to_multiple_of", "new_token_rows", "chat_template", "copy_tokenizer_from", "allow_config_difference", "tie_word_embeddings", "tokens", "exclude", "only",
    "seed", "aim",
)  # fmt: skip
RECORD_KEYS = (
    "schema", "inputs", "outputs", "side_files", "versions", "command", "notes", "warnings", "report", "identity",
)  # fmt: skip
"""What merge_recipe.json has besides: it says what came of the recipe, and is passed over."""


class Reader(Pieces):
    """Reads one file, collecting what is wrong with it; see `Pieces`."""

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
        slices = read_slices(self, content, cls, base)
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

    def read_layout(self, content: Mapping[str, Any], flags: Mapping[str, Any]) -> Layout:
        """The keys of vocabulary, head and side files, from the file and from flags."""
        before = len(self.problems)
        source, further = read_vocabulary(self, content)
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
