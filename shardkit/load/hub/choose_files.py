"""Choose which files of a repository on the Hub from_pretrained has to download.

1. The choice is made from the listing and a few small files, before any weights are downloaded.
2. A model has the weights that its library would take: those of one kind, safetensors first, and
   with an index exactly the files that the index names.
3. A pipeline has the files that ``DiffusionPipeline.download`` of Diffusers selects, but for these:
   code only if it is trusted; nothing of a component that the user passes, optional ones too; and
   if that selection leaves a component without weights, although there are some that the caller
   accepts, then those.
4. Every file that an index names must be in the listing: otherwise the download would be useless.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Literal

from shardkit.errors import FormatError, LoadError
from shardkit.limits import Limits
from shardkit.metadata import shard_index
from shardkit.metadata.shard_names import DIFFUSERS_STEM, INDEX_NAME, index_name
from shardkit.printable import listed, printable, shown

_PIPELINE, _MODEL, _ADAPTER = "model_index.json", "config.json", "adapter_config.json"

# What each library looks for, in its order. Where torch files are asked for, Diffusers looks for
# their index first.
_TRANSFORMERS = (
    "model.safetensors",
    INDEX_NAME,
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_DIFFUSERS = (
    index_name(DIFFUSERS_STEM),
    *(f"{DIFFUSERS_STEM}.{suffix}" for suffix in ("safetensors", "bin", "bin.index.json")),
)
# The files that Diffusers downloads from the root of every repository with a pipeline.
_ROOT_FILES = frozenset(
    f"{_PIPELINE} {_MODEL} pipeline.py scheduler_config.json chat_template.jinja "
    "generation_config.json preprocessor_config.json processor_config.json tokenizer.json "
    "tokenizer_config.json".split()
)
# A folder of a component with a file that ends so is one of a model; Diffusers leaves out the dot.
_MODEL_SUFFIXES = ("bin", "safetensors", "onnx", "pb", "flashpack")

_WEIGHTS = re.compile(r".*\.(safetensors|bin|pth?|ckpt|h5|msgpack|gguf|onnx|pb|flashpack)")
# Configurations and the files of tokenizers; no prose, and no index, which is chosen by its name.
_SMALL = re.compile(
    r"(?!(?i:readme|licen[cs]e|notice|requirements|changelog)|.*\.index(\.[^/]+)?\.json$)"
    r"([^/]+\.(json|model|tiktoken|jinja|spm|bpe|codes|vocab|txt)"
    r"|additional_chat_templates/[^/]+\.jinja)"
)
_FOREIGN = {
    "GGUF files": re.compile(r".*\.gguf"),
    "ONNX files": re.compile(r".*\.onnx"),
    "an adapter": re.compile(r".*(adapter_model|lora).*\.(safetensors|bin)"),
    "original weights": re.compile(r"(.*/)?(original/.+|consolidated.*\.(pth|safetensors))"),
    "weights of TensorFlow or Flax": re.compile(r".*\.(h5|msgpack)"),
}
_BROKEN = "the repository is damaged: try another revision, or tell its owner"

Kind = Literal["pipeline", "diffusers", "transformers"]
_MODEL_KINDS: tuple[Kind, Kind] = ("diffusers", "transformers")


@dataclass(frozen=True, slots=True)
class Choice:
    """The files of a repository that are downloaded.

    Attributes:
        kind: what they make: a pipeline, a model of Diffusers, or one of Transformers.
        weights: the files with weights, as paths in the repository, sorted.
        others: the small files: configurations, indexes, tokenizers, code; sorted likewise.
    """

    kind: Kind
    weights: tuple[str, ...]
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What of a repository is asked for.

    Attributes:
        subfolder: the folder of the model in the repository.
        variant: the word in the names of the weights.
        use_safetensors: True for safetensors files only, False for torch files only; None for
            either.
        trusted: whether code of the repository may be run.
        given: the components of a pipeline that the user passes.
    """

    subfolder: str = ""
    variant: str | None = None
    use_safetensors: bool | None = None
    trusted: bool = False
    given: frozenset[str] = frozenset()


def choose(
    repo: str, names: Collection[str], read: Callable[[str], bytes], wanted: Wanted
) -> Choice:
    """Choose the files of a repository that from_pretrained needs.

    Args:
        repo: the name of the repository, for messages.
        names: the paths of all its files.
        read: returns the content of a file; it is called for config.json or model_index.json, and
            for the indexes of the weights that are chosen.
        wanted: which weights, and of which folder.

    Raises:
        LoadError: there is no model or pipeline, or there are no weights of the variant and the
            kind that are asked for, or a file that describes them is invalid.

    Example:
        >>> from shardkit.load.hub.choose_files import Wanted, choose
        >>> names = ["README.md", "config.json", "model.safetensors", "pytorch_model.bin"]
        >>> choose("org/name", names, lambda name: b"{}", Wanted())
        Choice(kind='transformers', weights=('model.safetensors',), others=('config.json',))
    """
    whole = _Place(repo, "", frozenset(names), read)
    place = whole.inside(PurePosixPath(wanted.subfolder).as_posix().strip("/"))
    if _PIPELINE in place.names:
        return _pipeline(place, place.fields(_PIPELINE), wanted)
    if _ADAPTER in place.names:
        raise LoadError(
            f"{place} holds an adapter, which PEFT applies to a model",
            hint="load the model, and give it to peft.PeftModel.from_pretrained with this adapter",
        )
    if _MODEL not in place.names:
        raise _no_model(whole, place)
    fields = place.fields(_MODEL)
    kind: Kind = "diffusers" if "_class_name" in fields else "transformers"
    return _model(place, kind, fields, wanted)


@dataclass(frozen=True, slots=True)
class _Place:
    """A folder of a repository."""

    repo: str
    prefix: str  # its path with a slash at the end; empty for the repository itself
    names: frozenset[str]  # of the files in it and below, relative to it
    get: Callable[[str], bytes]  # what is in a file, by its path in the repository

    def __str__(self) -> str:
        return printable(f"{self.repo}/{self.prefix}".rstrip("/"))

    def inside(self, folder: str) -> _Place:
        """The *folder* in this one; this one if it has no name."""
        if folder in ("", "."):
            return self
        start = f"{folder}/"
        names = (name.removeprefix(start) for name in self.names if name.startswith(start))
        return _Place(self.repo, f"{self.prefix}{start}", frozenset(names), self.get)

    def fields(self, name: str) -> dict[str, object]:
        """The object in the JSON file *name*. NaN and Infinity are let through, which some models
        have.
        """
        try:
            found: object = json.loads(self.get(self.prefix + name))
        except (ValueError, RecursionError) as error:
            raise LoadError(f"{self}/{name} is not JSON: {error}", hint=_BROKEN) from None
        if not isinstance(found, dict):
            raise LoadError(
                f"{self}/{name} must hold an object, found {shown(found)}", hint=_BROKEN
            )
        return found

    def complete(self, entry: str) -> set[str]:
        """*entry*, and the files with weights that it names if it is an index."""
        if not entry.endswith(".json"):
            return {entry}
        try:
            content = self.get(self.prefix + entry)
            shards = shard_index.parse(
                Path(self.repo, self.prefix, entry), content, Limits()
            ).shards
        except FormatError as error:
            raise LoadError(str(error), hint=_BROKEN) from None
        folder = entry.rpartition("/")[0]
        found = [f"{folder}/{name}" if folder else name for name in shards]
        missing = [shown(name) for name in found if name not in self.names]
        if missing:
            raise LoadError(
                f"{self}/{printable(entry)} names files that are not in the repository: "
                f"{listed(missing)}",
                hint=_BROKEN,
            )
        return {entry, *found}

    def choice(self, kind: Kind, names: Iterable[str]) -> Choice:
        """What is chosen if *names* are."""
        paths = sorted(self.prefix + name for name in names)
        weights = tuple(filter(_WEIGHTS.fullmatch, paths))
        return Choice(kind, weights, tuple(path for path in paths if path not in weights))


def _model(place: _Place, kind: Kind, fields: Mapping[str, object], wanted: Wanted) -> Choice:
    """Choose the files of one model."""
    named = fields.get("transformers_weights") if kind == "transformers" else None
    if isinstance(named, str):
        entry = _named(place, named)
    else:
        sought = [*_sought(kind, wanted.variant, wanted.use_safetensors)]
        entry = next((name for name in sought if name in place.names), "")
        if not entry:
            raise _no_weights(place, f" under any of these names: {listed([*map(shown, sought)])}")
    chosen = place.complete(entry) | {_MODEL}
    if kind == "transformers":
        chosen |= place.names & {*_extra_files(fields)} | {*filter(_SMALL.fullmatch, place.names)}
    if wanted.trusted:  # in folders below too, from which other code may import
        chosen |= {name for name in place.names if name.endswith(".py")}
    return place.choice(kind, chosen)


def _named(place: _Place, name: str) -> str:
    """The file with weights, or the index, that config.json calls *name*."""
    fault = shard_index.fault_of_name(name)
    if not name.endswith((".safetensors", ".safetensors.index.json")):
        fault = fault or "is neither a safetensors file nor an index of some"
    if name not in place.names:
        fault = fault or "is not in the repository"
    if fault is None:
        return name
    raise LoadError(
        f"{place}/config.json: transformers_weights is {shown(name)}, which {fault}", hint=_BROKEN
    )


def _extra_files(fields: Mapping[str, object]) -> tuple[str, ...]:
    """The files that Transformers loads beside the weights of models of this type.

    The class of the configuration names them, so Transformers is asked.
    """
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or find_spec("transformers") is None:
        return ()
    from transformers import CONFIG_MAPPING

    try:
        return tuple(getattr(CONFIG_MAPPING[model_type], "extra_files", ()))
    except KeyError:  # a type of the repository's own code
        return ()


def _sought(kind: Kind, variant: str | None, use_safetensors: bool | None) -> Iterator[str]:
    """The names under which a library looks for the weights of a model, in its order."""
    names = _DIFFUSERS if kind == "diffusers" else _TRANSFORMERS
    if kind == "diffusers" and use_safetensors is False:
        names = names[::-1]
    for name in names:
        if use_safetensors not in (None, ".safetensors" in name):
            continue
        stem, _, suffix = name.rpartition(".")
        yield f"{stem}.{variant}.{suffix}" if variant else name
        if variant and kind == "diffusers" and stem.endswith(".index"):
            yield f"{stem.removesuffix('.index')}.{variant}.index.{suffix}"  # as it was once spelt


def _pipeline(place: _Place, fields: Mapping[str, object], wanted: Wanted) -> Choice:
    """Choose the files of a pipeline.

    Some pipelines name others in README.md, which Diffusers calls connected and downloads too. They
    are other repositories, and are not fetched.
    """
    ignored = fields.get("_ignore_files")
    names = place.names - {*map(str, ignored if isinstance(ignored, list) else ())}
    parts = {key: each for key, each in fields.items() if isinstance(each, list) and key[:1] != "_"}
    models = {_folder(name) for name in names if name.endswith(_MODEL_SUFFIXES)} & parts.keys()

    safe = wanted.use_safetensors is not False and _all_safe(names, models, wanted)
    if wanted.use_safetensors and not safe:
        raise _no_weights(place, " in safetensors files for every component")
    onnx = "Onnx" in str(fields.get("_class_name"))  # so in all whose weights are ONNX files
    barred = (".bin" if safe else ".safetensors", ".msgpack", *(() if onnx else (".onnx", ".pb")))
    weights = _weights(place, {name for name in names if not name.endswith(barred)}, wanted.variant)

    allowed = weights | {f"{folder}/{_MODEL}" for folder in models} | {*_code(fields)}
    allowed = {name for name in allowed if _component(name) not in wanted.given} | _ROOT_FILES
    complete = tuple(f"{folder}/" for folder in parts.keys() - models - wanted.given)
    # Diffusers leaves the older indexes of the other kind, for which it then lacks the shards.
    barred_index = re.compile(rf".*({'|'.join(map(re.escape, barred))})(\.[^/]+)?\.index\..*json")
    chosen = {
        name
        for name in place.names
        if (name in allowed or name.startswith(complete))
        and not (name.endswith(barred) or barred_index.fullmatch(name))
        and (wanted.trusted or not name.endswith(".py"))
    }
    # A component that model_index.json sets to null is not loaded. One without a folder is here.
    loaded = {key for key, each in parts.items() if None not in each} - wanted.given
    folders = {_component(name) for name in place.names}
    for folder in {key if key in folders else "" for key in loaded}:
        chosen |= _needed(place, folder, chosen, wanted)
    return place.choice("pipeline", chosen)


def _all_safe(names: Collection[str], models: Collection[str], wanted: Wanted) -> bool:
    """Whether every component has weights in safetensors files."""
    weights = [name for name in names if name.endswith(_MODEL_SUFFIXES)]
    weights = [name for name in weights if not models or _folder(name) in models]
    inside = _by_component(weights)
    parts = [group for part, group in inside.items() if part and part not in wanted.given]
    # Diffusers does not look at the older spelling here
    spellings = [each for each in _spellings(wanted.variant) if not each.older]
    return all(
        any(name.endswith(".safetensors") for name in _spelt(group, spellings)[0])
        for group in parts or [weights]
    )


def _weights(place: _Place, names: Iterable[str], variant: str | None) -> set[str]:
    """The weights and indexes among *names*: of the variant in components that have it."""
    chosen: set[str] = set()
    varied = variant is None
    for group in _by_component(names).values():
        files, spelling = _spelt(group, _spellings(variant))
        chosen |= files | {name for name in group if re.match(spelling.index, _base(name))}
        varied |= bool(files) and spelling.varied
    if not varied:
        raise _no_weights(place, f" of the variant {shown(variant)}")
    return chosen


@dataclass(frozen=True, slots=True)
class _Spelling:
    """How files with weights, and their indexes, are called in the folders of a pipeline."""

    file: str  # a regular expression, as below
    index: str
    varied: bool = False  # whether the variant is in the names
    older: bool = False  # whether it is where Diffusers once wrote it


def _spellings(variant: str | None) -> list[_Spelling]:
    """How the names may be spelt, in the order in which Diffusers looks for them."""
    stem = f"(?:{DIFFUSERS_STEM}|model|weights|pytorch_model)"
    kind = "(?:bin|safetensors|onnx|pb)"
    shard, word = r"\d{5}-of-\d{5}", re.escape(variant or "")
    plain = _Spelling(rf"{stem}(-{shard})?\.{kind}$", rf"{stem}\.{kind}\.index\.json")
    new = rf"{stem}\.{word}(-{shard})?\.{kind}$", rf"{stem}\.{kind}\.index\.{word}\.json$"
    old = rf".*-{shard}\.{word}\.[a-z]+$", rf"{stem}\.{kind}\.{word}\.index\.json$"
    varied = [_Spelling(*new, varied=True), _Spelling(*old, varied=True, older=True)]
    return [plain] if variant is None else [*varied, plain]


def _spelt(names: Collection[str], ways: Iterable[_Spelling]) -> tuple[set[str], _Spelling]:
    """The files in the first spelling that some have, and the spelling; else none, and the last."""
    tried = [({name for name in names if re.match(way.file, _base(name))}, way) for way in ways]
    return next((pair for pair in tried if pair[0]), tried[-1])


def _code(fields: Mapping[str, object]) -> Iterator[str]:
    """The files with code that model_index.json asks for, if they are in the repository."""
    for name, value in fields.items():
        match value:
            case [str(module), *_]:
                yield f"{module}.py" if name == "_class_name" else f"{name}/{module}.py"


def _needed(place: _Place, folder: str, chosen: Collection[str], wanted: Wanted) -> set[str]:
    """The weights that are loaded of the component in *folder*, of which some are *chosen*.

    Raises:
        LoadError: there are none of the kind that is asked for, but of another.
    """
    part, start = place.inside(folder), f"{folder}/" if folder else ""
    has = {name.removeprefix(start) for name in chosen if name.startswith(start)}
    entry = _entry(has, wanted.variant, wanted.use_safetensors)
    if entry is None and (folder or wanted.use_safetensors is None):
        # Diffusers takes torch files for all if one component has nothing else, even for another
        # that has only safetensors, which it then fails to load.
        entry = _entry(part.names, wanted.variant, None)
        if entry is not None and wanted.use_safetensors is not None:
            raise _no_weights(part, " of the kind that use_safetensors asks for")
    return set() if entry is None else {start + name for name in part.complete(entry)}


def _entry(names: Collection[str], variant: str | None, use_safetensors: bool | None) -> str | None:
    """The file among *names* from which a component is loaded: one of the variant if there is."""
    sought = (
        name
        for word in dict.fromkeys((variant, None))
        for kind in _MODEL_KINDS
        for name in _sought(kind, word, use_safetensors)
    )
    return next((name for name in sought if name in names), None)


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _component(name: str) -> str:
    """The component in whose folder the file *name* is; empty if it is in none, or further down."""
    return _folder(name) if name.count("/") == 1 else ""


def _by_component(names: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[_component(name)].append(name)
    return groups


def _no_weights(place: _Place, which: str) -> LoadError:
    """The error that *place* has no such weights, with those that it has."""
    there = sorted(filter(_WEIGHTS.fullmatch, place.names))
    return LoadError(
        f"{place} has no weights{which}; it has {listed([*map(shown, there)]) or 'none'}"
        f"{_foreign(there)}",
        hint="leave out variant and use_safetensors"
        if any(name.endswith((".safetensors", ".bin")) for name in there)
        else "choose a repository with the weights in safetensors or torch files",
    )


def _no_model(whole: _Place, place: _Place) -> LoadError:
    """The error that *place* does not say what it holds, with what it has."""
    models = {name for name in whole.names if _base(name) in (_PIPELINE, _MODEL)}
    elsewhere = sorted({_folder(name) or "." for name in models})
    there = sorted(place.names, key=lambda name: (name.count("/"), name))
    return LoadError(
        f"{place} has neither config.json nor model_index.json, one of which says what it holds; "
        f"it has {listed([*map(shown, there)]) or 'no files'}{_foreign(there)}",
        hint=f"pass subfolder; there is a model in {listed([*map(shown, elsewhere)])}"
        if elsewhere
        else "choose a repository that Transformers or Diffusers can load",
    )


def _foreign(names: Collection[str]) -> str:
    """What *names* are that is not loaded here, as the end of a sentence."""
    kinds = [what for what, pattern in _FOREIGN.items() if any(map(pattern.fullmatch, names))]
    return f" ({', '.join(kinds)}, which from_pretrained does not load)" if kinds else ""
