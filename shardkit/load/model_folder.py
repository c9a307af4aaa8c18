"""A folder as Transformers saves it: what class of model is in it, with which configuration, and in which file its weights are.

Nothing is fetched from the network, and no code of the folder is run unless it is trusted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, cast

from shardkit.errors import LoadError, shown, shown_path
from shardkit.load.assign import listed

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

_INSTALL = 'pip install "transformers>=5,<6"'
_MAKE_IT = "make the model yourself, and call load_checkpoint_and_dispatch"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What is in a folder, of which only config.json has been read.

    Attributes:
        path: the folder.
        kind: the class of the model.
        config: its configuration.
        weights: the file that Transformers would read; or else the folder, in which there may be one of another name.
    """

    path: Path
    kind: type[PreTrainedModel]
    config: PreTrainedConfig
    weights: Path

    @classmethod
    def at(cls, path: str | PathLike[str], *, subfolder: str, variant: str | None, trusted: bool) -> ModelFolder:
        """What is in the folder *path*, or in the cache of the Hub under that name.

        Args:
            path: the folder, or the name of a model on the Hub.
            subfolder: the folder inside it that is meant.
            variant: the word in the names of the weights.
            trusted: whether code that lies in it may be run.

        Raises:
            LoadError: Transformers is not there, or the folder holds nothing for it.
        """
        _check_installed()
        folder = _local(path, subfolder)
        _check_is_of_transformers(folder)
        with told(folder):
            kind, config = _configured(folder, trusted)
        return cls(folder, kind, config, _weights_in(folder, variant, config))

    def generation_config(self) -> GenerationConfig:
        """What Transformers would set in the model if it read the weights itself."""
        from transformers import GenerationConfig

        load = cast("Callable[..., GenerationConfig]", GenerationConfig.from_pretrained)
        if (self.path / "generation_config.json").is_file():
            return load(self.path, local_files_only=True)
        return load(self.path, config_file_name="config.json", _from_model_config=True, local_files_only=True)


@contextmanager
def told(folder: Path) -> Iterator[None]:
    """Let what Transformers raises about *folder* be a LoadError."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    kinds = (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError, StrictDataclassError)
    try:
        yield
    except kinds as error:
        raise LoadError(f"{shown_path(folder)}: Transformers {transformers.__version__} makes no model of it: {error}") from error


def _check_installed() -> None:
    if find_spec("transformers") is None:
        raise LoadError("from_pretrained needs Transformers, which is not installed", hint=_INSTALL)
    import transformers

    if transformers.__version__.partition(".")[0] != "5":
        found = f"from_pretrained needs Transformers 5, and {transformers.__version__} is installed"
        raise LoadError(found, hint=f"{_INSTALL}; or {_MAKE_IT}")


def _local(path: str | PathLike[str], subfolder: str) -> Path:
    from huggingface_hub import try_to_load_from_cache

    given = Path(path)
    if given.is_dir():
        return given / subfolder
    file = Path(subfolder, "config.json").as_posix()
    is_name = _REPOSITORY.fullmatch(str(path)) and not given.exists()
    cached = try_to_load_from_cache(str(path), file) if is_name else None
    if not isinstance(cached, str):
        what = "is a file" if given.exists() else "is no folder, and no model in the cache of the Hub"
        raise LoadError(
            f"{shown_path(given)} {what}; a folder with a config.json is needed", hint=f"download the model first; or {_MAKE_IT}"
        )
    return Path(cached).parent


def _check_is_of_transformers(folder: Path) -> None:
    if (folder / "model_index.json").is_file():
        raise LoadError(
            f"{shown_path(folder)} holds a pipeline of Diffusers, as its model_index.json says, and not a model of Transformers",
            hint=f"for one of its parts that is, name it, as in subfolder='text_encoder'; for another, {_MAKE_IT}",
        )
    if (folder / "adapter_config.json").is_file():
        raise LoadError(
            f"{shown_path(folder)} holds an adapter, which PEFT puts on top of a model",
            hint="load the folder of the model, and give it to peft.PeftModel.from_pretrained with this one",
        )
    if not (folder / "config.json").is_file():
        raise LoadError(f"{shown_path(folder)} has no config.json, which says what model it is", hint=_MAKE_IT)


def _configured(folder: Path, trusted: bool) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class that config.json asks for, and its configuration."""
    from transformers import AutoConfig, PreTrainedConfig

    fields, _ = PreTrainedConfig.get_config_dict(folder, local_files_only=True)
    if "_class_name" in fields:
        raise LoadError(
            f"{shown_path(folder)} is a {shown(fields['_class_name'])} of Diffusers, and not a model of Transformers",
            hint=_MAKE_IT,
        )
    kind = _class(folder, fields, trusted)
    own: type[PreTrainedConfig] | None = getattr(kind, "config_class", None)
    load = cast("Callable[..., PreTrainedConfig]", (own or AutoConfig).from_pretrained)
    return kind, load(folder, local_files_only=True, **({} if own else {"trust_remote_code": trusted}))


def _class(folder: Path, fields: Mapping[str, object], trusted: bool) -> type[PreTrainedModel]:
    import transformers

    architectures = fields.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(name, str):
        raise LoadError(
            f"{shown_path(folder / 'config.json')} names no class under 'architectures'",
            hint="write the name of the model's class there",
        )
    remote = _remote(fields, name)
    if remote is not None and trusted:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(remote, str(folder), local_files_only=True)
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    raise LoadError(
        f"{shown_path(folder / 'config.json')} asks for {shown(name)}, which Transformers {transformers.__version__} has not",
        hint="its code lies in the folder: read it, and if you trust it, pass trust_remote_code=True"
        if remote is not None
        else "a newer Transformers may have it",
    )


def _remote(fields: Mapping[str, object], name: str) -> str | None:
    """Where the folder has the code of the class *name*, as its auto_map says it."""
    auto_map = fields.get("auto_map")
    places = auto_map.values() if isinstance(auto_map, dict) else ()
    return next((place for place in places if isinstance(place, str) and place.rpartition(".")[2] == name), None)


def _weights_in(folder: Path, variant: str | None, config: PreTrainedConfig) -> Path:
    extra = [name for name in getattr(type(config), "extra_files", ()) if (folder / name).exists()]
    if extra:
        raise LoadError(f"{shown_path(folder)} has weights in files of their own, which are not loaded here: {listed(extra)}")
    named = getattr(config, "transformers_weights", None)
    if isinstance(named, str) and (".." in Path(named).parts or Path(named).is_absolute()):
        raise LoadError(f"{shown_path(folder)}: config.json has its weights elsewhere, in {shown(named)}")
    names = [named] if isinstance(named, str) else [_varied(name, variant) for name in _WEIGHTS]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None and (variant or named):
        raise LoadError(f"{shown_path(folder)} has no weights under any of these names: {listed(names)}")
    return found or folder


def _varied(name: str, variant: str | None) -> str:
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}" if variant else name
