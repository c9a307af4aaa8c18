"""The folder of a model by its name on the Hub, which is downloaded if the cache does not have it.

Before the first weight is asked for, the headers of the weights are. They stand in for the files,
with holes for the data, so that the model is made and its device map chosen as it will be with the
weights: a budget that is too small is an error before they are downloaded.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from shardkit.errors import FormatError, LoadError, OverBudget
from shardkit.load.devices.budgets import Device, free_memory
from shardkit.load.devices.device_lookup import device_of
from shardkit.load.hub.choose_files import Wanted
from shardkit.load.hub.download import Download, locate
from shardkit.load.hub.repository import Repository
from shardkit.load.libraries import diffusers_model, folder_models, transformers_model
from shardkit.load.libraries.model_folder import ModelFolder, Request
from shardkit.load.libraries.place_models import Placed, Placing
from shardkit.load.modules.quantised import method_of
from shardkit.load.modules.sizes import as_torch_dtype, class_names
from shardkit.load.modules.weights import weights_of
from shardkit.printable import shown, shown_path
from shardkit.sizes import format_size
from shardkit.sources import path_arguments
from shardkit.system.progress import announce


@dataclass(frozen=True, slots=True)
class HubOptions:
    """How a model is found on the Hub; the attributes are arguments of `from_pretrained`."""

    revision: str | None = None
    cache_dir: str | PathLike[str] | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    force_download: bool = False

    def folder(
        self,
        path: str | PathLike[str],
        subfolder: str,
        request: Request,
        placing: Placing,
        components: Mapping[str, object],
    ) -> ModelFolder:
        """The folder *path*, or that of the model which has this name on the Hub.

        Args:
            path: the folder, or the name.
            subfolder: the folder inside it that is meant.
            request: how the model is made.
            placing: where its weights go.
            components: parts of a pipeline that need not be downloaded.

        Raises:
            LoadError: there is no such model, or it cannot be downloaded, or will not fit.
        """
        given = path_arguments.to_read(path)
        has_client = find_spec("huggingface_hub") is not None
        if given.exists() or not has_client or not Repository.is_name(str(path)):
            return ModelFolder.at(path, subfolder)
        name, subfolder = str(path), subfolder.strip("/")
        repository = Repository.of(name, self.revision, self.token, self.cache_dir)
        wanted = Wanted(
            subfolder,
            request.variant,
            request.use_safetensors,
            request.trusted,
            frozenset(components),
        )
        try:
            found = locate(
                repository, wanted, local_only=self.local_files_only, anew=self.force_download
            )
        except LoadError as error:
            raise LoadError(
                f"there is no folder {shown_path(given)}, and no model of that name to load: "
                f"{error}",
                hint=error.hint,
            ) from None
        if isinstance(found, Download):
            found = _downloaded(found, subfolder, request, placing, components)
        return ModelFolder.at(found, subfolder, name=name)


def _downloaded(
    download: Download,
    subfolder: str,
    request: Request,
    placing: Placing,
    components: Mapping[str, object],
) -> Path:
    """Say what is to come and whether it will fit, and download it."""
    name = download.repository.name
    room = download.check_room()
    if not {file.name for file in download.missing} & {*download.choice.weights}:
        announce(room)
        return download.fetch()
    try:
        with TemporaryDirectory(prefix="shardkit-") as beside:
            place = Path(beside, name.replace("/", "--"))
            try:
                has_headers = download.stand_in(place)
                folder = ModelFolder.at(place, subfolder, name=name)
                with _unseen():
                    fit = (
                        _fit_by_headers(folder, request, placing, components)
                        if has_headers
                        else _fit_by_config(folder, request, placing)
                    )
            except FormatError as error:
                raise LoadError(
                    f"{name} on the Hub: {str(error).replace(f'{place}/', '')}",
                    hint="the repository is damaged: try another revision, or tell its owner",
                ) from None
    except OSError as error:
        raise LoadError(
            f"the headers of {name} cannot be written to the folder for temporary files: "
            f"{error.strerror or error}",
            hint="free some space there, or set TMPDIR to another folder",
        ) from None
    announce(f"{room}; {fit}")
    return download.fetch()


@contextmanager
def _unseen() -> Iterator[None]:
    """Make a model that nobody is to see: it says nothing, and draws no random numbers that count.

    What it would say comes again with the weights.
    """
    with ExitStack() as restored:
        restored.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        restored.enter_context(torch.random.fork_rng(devices=[]))
        for name in ("transformers", "diffusers"):
            if find_spec(name) is None:
                continue
            log = import_module(f"{name}.utils.logging")
            restored.callback(log.set_verbosity, log.get_verbosity())
            log.set_verbosity_error()
            if log.is_progress_bar_enabled():
                restored.callback(log.enable_progress_bar)
                log.disable_progress_bar()
        yield


def _fit_by_headers(
    folder: ModelFolder, request: Request, placing: Placing, components: Mapping[str, object]
) -> str:
    """A sentence on where the weights will go, whose headers are in *folder*.

    Raises:
        LoadError: Transformers or Diffusers makes no model of them.
        OverBudget: they will not fit.
    """
    if request.trusted and "auto_map" in folder.fields:
        return "whether it will fit is not known before its own code runs"
    if folder.kind != "diffusers" and any(map(_is_quantised, folder.path.rglob("config.json"))):
        return "whether it will fit is not known before its quantised weights are here"
    models = folder_models.models_alone(folder, request, components)
    placed = Placed.of(models, _unmeasured(placing))
    nbytes: Counter[Device] = Counter()
    for weight in weights_of(placed.tree):
        nbytes[device_of(weight.names[0], placed.devices)] += weight.tensor.nbytes
    return _fits(folder, nbytes, "as the headers of its weights say")


def _fit_by_config(folder: ModelFolder, request: Request, placing: Placing) -> str:
    """A sentence on where the weights will go of a model whose config.json alone is in *folder*.

    Raises:
        LoadError: Transformers or Diffusers makes no model of it.
        OverBudget: they will not fit.
    """
    dtype = request.dtype or _dtype(folder.fields)
    if (
        folder.kind == "pipeline"
        or dtype is None
        or method_of(folder.fields) is not None
        or (request.trusted and "auto_map" in folder.fields)
    ):
        return "whether it will fit is not known before its weights are here"
    maker = diffusers_model if folder.kind == "diffusers" else transformers_model
    model = maker.without_weights(folder, request.trusted)
    whole = class_names(getattr(model, "_no_split_modules", None))
    options = replace(_unmeasured(placing).options(whole, model), dtype=dtype)
    devices = options.residents(model, placing.word or placing.given).device_map
    nbytes: Counter[Device] = Counter()
    for weight in weights_of(model):
        tensor = weight.tensor
        itemsize = dtype.itemsize if tensor.is_floating_point() else tensor.element_size()
        nbytes[device_of(weight.names[0], devices)] += tensor.numel() * itemsize
    return _fits(folder, nbytes, "as its config.json says")


def _is_quantised(config: Path) -> bool:
    try:
        fields = json.loads(config.read_bytes())
    except ValueError:  # which is said where it is read
        return False
    return isinstance(fields, dict) and method_of(fields) is not None


def _unmeasured(placing: Placing) -> Placing:
    """*placing* with the smallest prefetch buffer, unless one is asked for."""
    return replace(placing, ring=placing.ring or 2, is_measured=False)


def _fits(folder: ModelFolder, nbytes: Mapping[Device, int], source: str) -> str:
    """A sentence on what each device will hold.

    Raises:
        OverBudget: more than it has.
    """
    for device, needed in nbytes.items():
        free = None if device == "disk" else free_memory(device)
        if free is not None and needed > free:
            raise OverBudget(
                f"{folder.name} will not fit: {format_size(needed)} of its weights go to "
                f"{shown(str(device))}, which has {format_size(free)} free, {source}; nothing was "
                "downloaded",
                needed=needed,
                available=free,
                hint='pass device_map="auto", which lets the rest stream from disk; or a narrower '
                "dtype",
            )
    held = [
        f"{format_size(count)} {'will stream from disk' if device == 'disk' else f'on {device}'}"
        for device, count in sorted(nbytes.items(), key=lambda item: item[0] == "disk")
    ]
    return f"it will fit, {source}: {', '.join(held)}"


def _dtype(fields: Mapping[str, object]) -> torch.dtype | None:
    """The type that config.json says."""
    name = fields.get("dtype") or fields.get("torch_dtype")
    try:
        return as_torch_dtype(name) if isinstance(name, str) else None
    except (LoadError, AttributeError, TypeError):
        return None
