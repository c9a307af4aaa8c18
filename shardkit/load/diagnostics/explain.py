"""Why each part of a model is where it is, and how long a forward takes: predicted and measured.

1. Everything is read from the model as it is now: from its hooks, and from its parameters and
   buffers.
2. Throughput is measured, in about a second, if something streams and none is given.
3. A prediction is for models whose time goes into matrix products, as that of language models does.
   Other operations of a forward are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import overload

import torch
from torch import nn

from shardkit.alignment import ALIGNMENT
from shardkit.load.devices.budgets import Device, device_key
from shardkit.load.devices.device_lookup import device_of
from shardkit.load.diagnostics.explanation import Explanation, Part, PipelineExplanation
from shardkit.load.dispatch.attachments import attachments
from shardkit.load.hooks.forward_timer import Clock
from shardkit.load.hooks.streaming_hooks import Pager
from shardkit.load.lazy.paged import is_address
from shardkit.load.lazy.streamed_weight import Streamed
from shardkit.load.modules.blocks import cut
from shardkit.load.modules.model_group import Pipeline
from shardkit.load.modules.sizes import prefixes
from shardkit.load.modules.torch_internals import own_modules
from shardkit.load.modules.weights import ParameterSlot, Weight, weights_of
from shardkit.load.performance.bandwidth import Product, Rates, common_product, measure
from shardkit.load.performance.cost_model import predict, step_of
from shardkit.load.placement.device_map import covers, inside
from shardkit.payloads.cast import Cast
from shardkit.payloads.compressed import Framed
from shardkit.payloads.payload import Extent, Payload


@overload
def explain(
    model: nn.Module, *, rows: int | None = None, rates: Rates | None = None
) -> Explanation: ...


@overload
def explain(
    model: Pipeline, *, rows: int | None = None, rates: Rates | None = None
) -> PipelineExplanation: ...


def explain(
    model: nn.Module | Pipeline, *, rows: int | None = None, rates: Rates | None = None
) -> Explanation | PipelineExplanation:
    """Explain why each part of *model* is where it is, and how long a forward of it takes.

    Args:
        model: a model that was dispatched, or any other; or a pipeline of Diffusers, for each of
            its models.
        rows: vectors that a forward multiplies, such as tokens; None for as many as in the last
            forward, or else one.
        rates: throughput of this machine in bytes per second; None to measure it, if something
            streams.

    Returns:
        A value that prints as a table, and has `as_dict`.

    Raises:
        FormatError: a file that weights stream from cannot be read.

    Example:
        >>> from shardkit.load import Rates, close, explain, init_empty_weights
        >>> from shardkit.load import load_checkpoint_and_dispatch
        >>> from torch import nn
        >>> with init_empty_weights():
        ...     model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> model = load_checkpoint_and_dispatch(model, "model.safetensors", {"": "disk"})
        >>> print(explain(model, rates=Rates(disk=1e9, copy=5e9, compute=2e10)))
        Sequential: 304 B of weights, of which 304 B stream
          disk  ...
        >>> close(model)
    """
    if isinstance(model, nn.Module):
        return _explained(_Found.of(model, getattr(model, "hf_device_map", {})), rows, rates)
    models = {name: part for name, part in model.components.items() if isinstance(part, nn.Module)}
    device_map = getattr(model, "hf_device_map", None) or {}
    explained = {
        name: _explained(_Found.of(each, inside(name, device_map)), rows, rates)
        for name, each in models.items()
    }
    return PipelineExplanation(type(model).__name__, explained)


def _explained(found: _Found, rows: int | None, rates: Rates | None) -> Explanation:
    parts, name = tuple(found.parts()), type(found.model).__name__
    series = found.clock.series if found.clock else None
    rows = rows or (series.rows if series else 0) or 1
    if not found.pagers:
        return Explanation(name, parts, rows=rows)
    streams = {pager.stream for pager in found.pagers.values()}
    ring = sum(stream.room for stream in streams)
    if rates is None:
        for (
            stream
        ) in streams:  # else what is read for the next forward shares the disk with the probe
            stream.rest()
        rates = measure(found.extents(), found.runner, replace(found.product(), rows=rows))
    predicted = predict([part.step for part in parts], rates, ring)
    measured = series if series and series.forwards and series.rows == rows else None
    return Explanation(
        name,
        parts,
        ring,
        rows,
        rates,
        predicted,
        measured,
        found.clock.depths if found.clock else (),
    )


@dataclass(slots=True)
class _Draft:
    """A part, weight by weight."""

    name: str
    place: Device
    why: str
    weights: list[Weight] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Found:
    """The state of a model that `explain` reports.

    Attributes:
        model: the model.
        pagers: for each slot of a streamed weight, the hook that loads it.
        names: the names of the blocks, by hook.
        clock: the timer of its forwards.
        device_map: the device map that was given; it may not cover every part.
        units: names of the modules that are reported as one part.
    """

    model: nn.Module
    pagers: Mapping[ParameterSlot, Pager]
    names: Mapping[Pager, str]
    clock: Clock | None
    device_map: Mapping[str, Device]
    units: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module, device_map: Mapping[str, Device]) -> _Found:
        """What is found in *model*, whose *device_map* says where its parts are if nothing
        streams.
        """
        names = {module: name for name, module in model.named_modules()}
        attached = [(names[module], each) for module, *_, each in attachments(model)]
        pagers = {each: name for name, each in attached if isinstance(each, Pager)}
        clock = next((each for _, each in attached if isinstance(each, Clock)), None)
        weights = list(weights_of(model))
        blocks = cut(
            model, weights, target=lambda weight: None if weight.is_buffer else "anywhere"
        ).blocks
        return cls(
            model=model,
            pagers={seat: pager for pager in pagers for seat in pager.seats},
            names=pagers,
            clock=clock,
            device_map=clock.device_map if clock else device_map,
            units=frozenset(block.name for block in blocks),
        )

    @property
    def runner(self) -> torch.device:
        """The device that runs what streams, or the first of them."""
        return next(iter(self.names)).stream.lane.device

    def parts(self) -> Iterator[Part]:
        """All of it, in the order of the model."""
        drafts: dict[tuple[str, str], _Draft] = {}
        for weight in weights_of(self.model):
            draft = self._draft(weight)
            drafts.setdefault((draft.name, draft.why), draft).weights.append(weight)
        return map(self._part, drafts.values())

    def extents(self) -> Iterator[Extent]:
        """What streams from files."""
        streamed = (
            weight.tensor
            for weight in weights_of(self.model)
            if isinstance(weight.tensor, Streamed)
        )
        return (source for tensor in streamed for source in tensor.recipe.storage.sources)

    def product(self) -> Product:
        """One of the matrices that most of what streams consists of."""
        streamed = (
            weight.tensor
            for weight in weights_of(self.model)
            if isinstance(weight.tensor, Streamed)
        )
        return common_product((tensor.dtype, tensor.shape) for tensor in streamed)

    def _draft(self, weight: Weight) -> _Draft:
        pager = self.pagers.get(weight.seats[0])
        written = isinstance(weight.tensor, Streamed) and not is_address(weight.tensor)
        if pager is None and isinstance(weight.tensor, Streamed) and not written:
            place = "disk" if weight.tensor.recipe.storage.sources else "cpu"
            return _Draft(self._unit(weight), place, "closed: read whenever it is used")
        if pager is None or written:
            why = "modified, so it stays in memory" if written else self._why_it_stays(weight)
            return _Draft(self._unit(weight), _place(weight.tensor.device), why)
        from_file = not isinstance(weight.tensor, Streamed) or bool(
            weight.tensor.recipe.storage.sources
        )
        return _Draft(
            self.names[pager],
            "disk" if from_file else "cpu",
            self._why_it_streams(weight, from_file=from_file),
        )

    def _unit(self, weight: Weight) -> str:
        """Return the module that *weight* is reported with; its own name if its module has
        submodules.
        """
        around = [name for name in prefixes(weight.names[0]) if name in self.units]
        owner = weight.names[0].rpartition(".")[0]
        return (
            around[-1]
            if around
            else weight.names[0]
            if own_modules(weight.seats[0].owner)
            else owner
        )

    def _why_it_streams(self, weight: Weight, *, from_file: bool) -> str:
        if not from_file and self._said(weight) == "disk":
            return "in no file: computed when the model was created"
        return (
            "does not fit beside the resident weights"
            if self.clock and self.clock.chosen
            else "set by the device map"
        )

    def _why_it_stays(self, weight: Weight) -> str:
        said = self._said(weight)
        if not self.pagers or (
            said not in (None, "disk") and (said != "cpu" or self.runner.type == "cpu")
        ):
            return "fits" if not self.clock or self.clock.chosen else "set by the device map"
        if len(weight.seats) > 1:
            return "tied: one copy for all its names"
        if weight.is_buffer:
            return "a buffer"
        below = set(weight.seats[0].owner.modules())
        contains = any(seat.owner in below for seat in self.pagers)
        if contains:
            return "direct weight of a module with blocks"
        return "in memory" if said is None else "shared by several blocks"

    def _said(self, weight: Weight) -> Device | None:
        """Where the map sends *weight*; None if there is none, or it says nothing."""
        name = weight.names[0]
        return device_of(name, self.device_map) if covers(self.device_map, name) else None

    def _part(self, draft: _Draft) -> Part:
        lazy = (
            each.tensor
            for each in draft.weights
            if isinstance(each.tensor, Streamed) and is_address(each.tensor)
        )
        streamed = [tensor.recipe.in_memory[0] for tensor in lazy]
        runs_on = self.runner if streamed and self.pagers else draft.weights[0].tensor.device
        return Part(
            name=draft.name,
            place=draft.place,
            runs_on=str(runs_on),
            nbytes=sum(map(_nbytes, draft.weights)),
            why=draft.why,
            step=step_of(
                streamed,
                compute=_multiplied(draft.weights, self.model),
                linked=runs_on.type != "cpu",
            ),
            cast=sum(
                payload.nbytes
                for payload in streamed
                if any(isinstance(each, Cast) for each in _layers(payload))
            ),
            compressed=sum(
                payload.nbytes
                for payload in streamed
                if any(isinstance(each, Framed) for each in _layers(payload))
            ),
            askew=sum(
                isinstance(payload, Extent) and payload.start % ALIGNMENT > 0
                for payload in streamed
            ),
        )


def _multiplied(weights: Iterable[Weight], model: nn.Module) -> int:
    """Bytes of *weights* that are multiplied in each forward."""
    return sum(_nbytes(weight) for weight in weights if _is_multiplied(weight, model))


def _is_multiplied(weight: Weight, model: nn.Module) -> bool:
    """Whether it is a matrix, and more than a table to look into."""
    owners = (seat.owner for seat in weight.seats)
    return weight.tensor.ndim > 1 and not all(isinstance(owner, nn.Embedding) for owner in owners)


def _layers(payload: Payload) -> Iterator[Payload]:
    """*payload*, and what it is made from."""
    yield payload
    inside = [
        getattr(payload, name) for name in ("inner", "storage", "frame") if hasattr(payload, name)
    ]
    for each in (*inside, *getattr(payload, "parts", ())):
        yield from _layers(each)


def _nbytes(weight: Weight) -> int:
    return weight.tensor.numel() * weight.tensor.element_size()


def _place(device: torch.device) -> Device:
    return device.type if device.type == "meta" else device_key(device)
