"""Match the tensors of a checkpoint to the weights of a model: names, shapes, types and ties,
before a byte moves.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from shardkit.checkpoint.entries import TensorEntry
from shardkit.dtypes import DType
from shardkit.errors import Mismatch
from shardkit.load.modules.weights import (
    ParameterSlot,
    Weight,
    extra_states,
    named_modules,
    stored_type,
    torch_type,
    unreal_buffers,
    weights_in,
)
from shardkit.payloads.cast import Cast, can_cast
from shardkit.payloads.payload import Payload
from shardkit.printable import shown


@dataclass(slots=True, unsafe_hash=True)
class Match:
    """One weight of a model, and the tensor of the checkpoint that is to live there.

    Attributes:
        names: all names of the weight in the model, in its order.
        entry: the tensor of the checkpoint.
        dtype: the type that the weight will have.
        shape: the shape that it will have, as torch counts it: two 4-bit floats are one element.
        is_buffer: whether it is a buffer (a persistent one) under each of its names.
        seats: where the model keeps it.
    """

    names: tuple[str, ...]
    entry: TensorEntry
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_buffer: bool
    seats: tuple[ParameterSlot, ...]

    @property
    def name(self) -> str:
        """Its first name in the model."""
        return self.names[0]

    @property
    def payload(self) -> Payload:
        """Its values as they will be in memory, cast where they are stored in another type."""
        target = stored_type(self.dtype)
        if target is None or target is self.entry.dtype or target == self.entry.dtype:
            return self.entry.payload
        return Cast(self.entry.payload, self.entry.dtype, target)

    @property
    def stored(self) -> TensorEntry:
        """The entry as if it were stored as it will be in memory."""
        target = stored_type(self.dtype) or self.entry.dtype
        shape = (*self.shape[:-1], self.shape[-1] * target.packed) if self.shape else ()
        return TensorEntry(self.entry.path, target, shape, self.payload)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in memory."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Change:
    """What a change of type comes to.

    Attributes:
        possible: whether torch has both types, and we know how.
        widens: whether 8-bit floats, which may be codes, become wider.
        other_kind: whether floats become integers or the reverse, or are so beside what the model
            declares.
    """

    possible: bool
    widens: bool = False
    other_kind: bool = False


@cache
def change_of(stored: DType, target: torch.dtype | None, declared: torch.dtype) -> Change:
    """What it comes to that a weight which is *stored* in one type gets *target* where the model
    has declared another.
    """
    known = stored_type(target) if target else None
    if target is None or known is None or torch_type(stored) is None:
        return Change(possible=False)
    is_float = stored.kind == "float"
    return Change(
        possible=stored == known or can_cast(stored, known),
        widens=is_float and stored.bits < 16 <= target.itemsize * 8,
        other_kind=len({is_float, target.is_floating_point, declared.is_floating_point}) > 1,
    )


def fitting_shape(tensor: torch.Tensor, entry: TensorEntry) -> tuple[int, ...] | None:
    """The shape that a weight of the model, now *tensor*, gets; None where that of *entry* does not
    fit.
    """
    packed = entry.dtype.packed
    if is_lazy(tensor):
        return (*entry.shape[:-1], entry.shape[-1] // packed) if entry.shape else ()
    if packed == 1 and tensor.shape == entry.shape:
        return entry.shape
    shape = tuple(tensor.shape)
    counted = (*shape[:-1], shape[-1] * packed) if shape else shape
    # As torch does: a scalar was a tensor of one element before torch 0.4.
    return shape if counted == entry.shape or (not shape and entry.shape == (1,)) else None


_LISTED = 5


@dataclass(frozen=True, slots=True)
class Assignment:
    """What goes where.

    Attributes:
        homes: the weights that are loaded, in the order of the model.
        extra: for modules with a `set_extra_state`, the key of their extra state and the tensor
            that is it.
        missing: names that the model has and the checkpoint has not, ties that are satisfied left
            out.
        unexpected: names that the checkpoint has and the model has not.
        notes: sentences that the user should see, those about missing and unexpected names
            included.
    """

    homes: tuple[Match, ...]
    extra: Mapping[str, TensorEntry] = field(default_factory=dict, hash=False)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def assign(
    model: nn.Module,
    entries: Mapping[str, TensorEntry],
    *,
    dtype: torch.dtype | None = None,
    keep_in_fp32: Collection[str] = (),
    strict: bool = False,
    where: str = "the checkpoint",
) -> Assignment:
    """Find the tensor of *entries* that belongs into each weight of *model*; touch neither.

    Args:
        model: empty or not.
        entries: the tensors of the checkpoint by their names.
        dtype: what floats are cast to; None for the types that the model has.
        keep_in_fp32: names of modules whose floats become float32 where *dtype* is narrower.
        strict: whether names that only one side has are an error.
        where: what the checkpoint is called in messages.

    Raises:
        Mismatch: a shape differs, a type cannot be had, a weight would stay on the meta device, no
            name is known, or *strict* and names differ. It lists everything that is wrong.
    """
    matching = _Matching(entries, dtype, keep_in_fp32)
    modules = list(named_modules(model))
    for weight in weights_in(modules):
        matching.settle(weight)
    for name in extra_states(modules):
        matching.settle_extra(name)
    matching.unexpected = [name for name in entries if name not in matching.known]
    stuck = [*matching.stuck, *unreal_buffers(modules)]
    matching.check(strict=strict, stuck=stuck, where=where)
    return Assignment(
        tuple(matching.homes),
        matching.extra,
        tuple(matching.missing),
        tuple(matching.unexpected),
        tuple(matching.notes(where)),
    )


def listed(names: Iterable[str]) -> str:
    """The first few of *names*, for a sentence."""
    return _each(shown(name) for name in names)


@dataclass(slots=True)
class _Matching:
    """What is found while the weights are gone through one by one."""

    entries: Mapping[str, TensorEntry]
    dtype: torch.dtype | None
    keep_in_fp32: Collection[str]
    known: set[str] = field(default_factory=set)
    homes: list[Match] = field(default_factory=list)
    extra: dict[str, TensorEntry] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    wrong_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    wrong_type: dict[str, str] = field(default_factory=dict)
    upcast: list[str] = field(default_factory=list)
    other_kind: list[str] = field(default_factory=list)
    several: list[str] = field(default_factory=list)

    def settle(self, weight: Weight) -> None:
        self.known.update(weight.names)
        found = [name for name in weight.names if name in self.entries]
        if not found:
            self.missing += weight.names
            self.stuck += weight.names if weight.tensor.is_meta else ()
            return
        entry = self.entries[found[0]]
        if len(found) > 1 and any(self.entries[name].payload != entry.payload for name in found):
            self.several.append(found[0])
        self._house(weight, entry)

    def settle_extra(self, name: str) -> None:
        self.known.add(name)
        if name in self.entries:
            self.extra[name] = self.entries[name]
        else:
            self.missing.append(name)

    def _house(self, weight: Weight, entry: TensorEntry) -> None:
        shape = fitting_shape(weight.tensor, entry)
        if shape is None:
            self.wrong_shape[weight.names[0]] = (entry.shape, tuple(weight.tensor.shape))
            return
        declared = weight.tensor.dtype
        target = declared if self.dtype is None else self._target(weight, entry, self.dtype)
        change = change_of(entry.dtype, target, declared)
        if target is None or not change.possible:
            self.wrong_type[weight.names[0]] = (
                f"{entry.dtype.code} as {target or declared}".replace("torch.", "")
            )
            return
        if change.widens:
            self.upcast.append(weight.names[0])
        if change.other_kind:
            self.other_kind.append(weight.names[0])
        self.homes.append(Match(weight.names, entry, target, shape, weight.is_buffer, weight.seats))

    def _target(self, weight: Weight, entry: TensorEntry, asked: torch.dtype) -> torch.dtype | None:
        """The type of *weight* if *asked* is wanted; None where torch does not have the one that is
        stored and would be kept.
        """
        own, declared = torch_type(entry.dtype), weight.tensor.dtype
        if entry.dtype.kind != "float" or (entry.dtype.bits < 16 and own == declared):
            return own
        if asked.itemsize < 4 and any(
            _lies_in(name, module) for name in weight.names for module in self.keep_in_fp32
        ):
            return torch.float32
        return asked

    def check(self, *, strict: bool, stuck: Sequence[str], where: str) -> None:
        """Raise Mismatch with everything that is wrong, if anything is."""
        lacking = tuple(dict.fromkeys([*(self.missing if strict else ()), *stuck]))
        wrong = [
            f"shape mismatch: {_shapes(self.wrong_shape)}" if self.wrong_shape else "",
            f"type not supported by torch: {_types(self.wrong_type)}" if self.wrong_type else "",
            f"missing{'' if strict else ', with no values in the model to keep'}: {listed(lacking)}"
            if lacking
            else "",
            f"not in the model: {listed(self.unexpected)}" if self.unexpected and strict else "",
            "no name is common to both"
            if self.known and self.entries and len(self.unexpected) == len(self.entries)
            else "",
        ]
        if any(wrong):
            raise Mismatch(
                f"{where} does not match the model: {'; '.join(filter(None, wrong))}",
                missing=tuple(dict.fromkeys([*self.missing, *stuck])),
                unexpected=tuple(self.unexpected),
                wrong_shape=self.wrong_shape,
                hint=_prefix_hint(self.missing, self.unexpected) or self._other_hint(stuck),
            )

    def _other_hint(self, stuck: Sequence[str]) -> str | None:
        if set(stuck) - set(self.missing):
            return (
                "create the model in shardkit.load.init_empty_weights(), which keeps buffers "
                "that no checkpoint holds in memory"
            )
        if stuck:
            return (
                "check that all shards are present and that the model has the same architecture "
                "and tied weights as the saved one"
            )
        return None

    def notes(self, where: str) -> Iterator[str]:
        if self.missing:
            kept = "keeps" if len(self.missing) == 1 else "keep"
            yield (
                f"{where} has no {listed(self.missing)}, which {kept} the values that the model has"
            )
        if self.unexpected:
            names = listed(self.unexpected)
            yield f"{where} has {names}, which the model does not have: not loaded"
        if self.several:
            yield (
                f"{listed(self.several)}: one weight in the model, and several in {where}, of "
                "which this one is loaded"
            )
        if self.upcast:
            yield (
                f"{where} holds {listed(self.upcast)} in 8-bit floats, which will be upcast: if "
                "they are quantised, the result is wrong without their scale tensors"
            )
        if self.other_kind:
            yield (
                f"{listed(self.other_kind)}: floats in the model and integers in {where}, or "
                "the reverse"
            )


def _lies_in(name: str, module: str) -> bool:
    """Tell whether *module* is a run of complete steps of the dotted *name*."""
    return f".{module}." in f".{name}."


def _shapes(wrong: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> str:
    return _each(
        f"{shown(name)} ({list(found)} in the checkpoint, {list(needed)} in the model)"
        for name, (found, needed) in wrong.items()
    )


def _types(wrong: Mapping[str, str]) -> str:
    return _each(f"{shown(name)} ({types})" for name, types in wrong.items())


def _each(sentences: Iterable[str]) -> str:
    every = list(sentences)
    more = f" and {len(every) - _LISTED:,} more" if len(every) > _LISTED else ""
    return ", ".join(every[:_LISTED]) + more


def _prefix_hint(missing: Sequence[str], unexpected: Sequence[str]) -> str | None:
    """Suggest what to do about names that differ by a prefix, which is never guessed."""
    if prefix := _prefix(missing, unexpected):
        return (
            f"the names in the checkpoint begin with {shown(prefix)}, as model wrappers write "
            f"them; remove it with "
            f"`shardkit convert --rename {shown('^' + re.escape(prefix) + '=')}`, and load the "
            "output"
        )
    if prefix := _prefix(unexpected, missing):
        return (
            f"the names in the model begin with {shown(prefix)}, and those in the checkpoint do "
            f"not: load into that submodule"
        )
    return None


def _prefix(bare: Sequence[str], longer: Sequence[str]) -> str:
    """What, put before most of the *bare* names, gives names among the *longer*; empty if there is
    nothing of the kind.
    """
    names = set(longer)
    for sample in bare[:_LISTED]:
        for prefix in (name.removesuffix(sample) for name in longer if name.endswith(f".{sample}")):
            if 2 * sum(prefix + name in names for name in bare) > len(bare):
                return prefix
    return ""
