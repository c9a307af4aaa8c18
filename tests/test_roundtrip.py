"""Laws: what is written is scanned again, and what torch loads is what safetensors loads from the
shards, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import shardkit
from shardkit.checkpoint.edits import Edits
from shardkit.checkpoint.entries import TensorEntry
from shardkit.dtypes import DTYPES, DType
from shardkit.formats import safetensors
from shardkit.limits import Limits
from shardkit.payloads.payload import Literal, Trailer
from shardkit.sources.format import Source
from truth import described

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda name: name != "__metadata__"
)
BOUNDS = st.one_of(st.none(), st.integers(1, 3000), st.integers(4000, 20_000))
TORCH = [d for d in DTYPES if d.torch and hasattr(torch, d.torch) and d.writable and d.bits >= 8]


@st.composite
def entries(draw: st.DrawFn) -> tuple[TensorEntry, ...]:
    """Tensors of every type of the format, with any name and any bytes; some of them tied."""
    found: dict[str, TensorEntry] = {}
    for name in draw(st.lists(NAMES, unique=True, max_size=8)):
        dtype: DType = draw(st.sampled_from([dtype for dtype in DTYPES if dtype.writable]))
        shape = draw(SHAPES) if dtype.bits >= 8 else (*draw(SHAPES), 4)
        content = draw(st.binary(min_size=dtype.nbytes(shape), max_size=dtype.nbytes(shape)))
        found[name] = TensorEntry((name,), dtype, shape, Literal(content))
    return tuple(found.values())


def read(entry: TensorEntry) -> tuple[str, tuple[int, ...], bytes]:
    return entry.dtype.code, entry.shape, bytes(entry.read())


@given(entries(), st.dictionaries(NAMES, st.text(st.characters(exclude_categories=["Cs"]))))
def test_what_is_laid_out_is_scanned_again(
    written: tuple[TensorEntry, ...], metadata: Mapping[str, str]
) -> None:
    names = {entry.name for entry in written}
    metadata = {key: text for key, text in metadata.items() if key == "format" or text not in names}
    parts = safetensors.lay_out(written, metadata)
    content = b"".join(
        bytes(chunk) for part in parts if not isinstance(part, Trailer) for chunk in part.chunks()
    )
    checkpoint = safetensors.scan(Source(Path("memory"), Literal(content), limits=Limits()))
    assert {entry.name: read(entry) for entry in checkpoint.tensors} == {
        entry.name: read(entry) for entry in written
    }
    assert checkpoint.metadata == {"format": "pt", **metadata}


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any type, shape and bytes, whose memory may be a view with gaps, turned, expanded
    or conjugated.
    """
    dtype = getattr(torch, str(draw(st.sampled_from(TORCH)).torch))
    shape = draw(SHAPES)
    count = prod(shape)
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    raw = torch.randint(
        0, 256, ((2 * count + 3) * dtype.itemsize,), dtype=torch.uint8, generator=random
    )
    flat = (raw & 1).view(dtype) if dtype == torch.bool else raw.view(dtype)
    match draw(st.sampled_from(["plain", "gaps", "turned", "expanded", "conjugated"])):
        case "gaps":
            return flat[1 : 1 + 2 * count : 2].view(shape)
        case "turned":
            return flat[:count].view(shape).permute(tuple(reversed(range(len(shape)))))
        case "expanded":
            return flat[2].expand(shape)
        case "conjugated" if dtype == torch.complex64:
            return flat[:count].view(shape).conj()
    return flat[3 : 3 + count].view(shape)


@st.composite
def states(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """A state dict, some of whose names are tied to earlier ones, or hold a part of them."""
    state: dict[str, torch.Tensor] = {}
    for name in draw(st.lists(NAMES, unique=True, min_size=1, max_size=8)):
        earlier = draw(st.sampled_from([None, None, *state.values()]))
        state[name] = draw(tensors()) if earlier is None else earlier
    return state


def truth(state: object) -> list[dict[str, object]]:
    return sorted(described(state), key=lambda tensor: str(tensor["name"]))


def converted(source: Path, out: Path, bound: int | None) -> dict[str, torch.Tensor]:
    report = shardkit.convert(source, out, max_shard=bound, root=".", sync=False)
    shards = {
        name: tensor
        for file in out.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    return shards | {alias: shards[kept] for alias, kept in report.aliases.items()}


@settings(max_examples=60)
@given(states(), BOUNDS, st.booleans())
def test_shards_of_a_torch_file_hold_what_torch_loads(
    tmp_path_factory: pytest.TempPathFactory,
    state: dict[str, torch.Tensor],
    bound: int | None,
    zipped: bool,
) -> None:
    folder = tmp_path_factory.mktemp("torch")
    torch.save(state, folder / "big.bin", _use_new_zipfile_serialization=zipped)
    assert truth(converted(folder / "big.bin", folder / "out", bound)) == truth(state)
    assert shardkit.verify(folder / "out", folder / "big.bin", Edits(root=".")).same


@settings(max_examples=40)
@given(states(), BOUNDS)
def test_shards_of_safetensors_hold_what_safetensors_loads(
    tmp_path_factory: pytest.TempPathFactory, state: dict[str, torch.Tensor], bound: int | None
) -> None:
    folder = tmp_path_factory.mktemp("safetensors")
    state = {
        name: tensor.resolve_conj().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    save_file(state, folder / "big.safetensors", {"format": "pt"})
    assert truth(converted(folder / "big.safetensors", folder / "out", bound)) == truth(state)


@settings(max_examples=20)
@given(states(), BOUNDS, BOUNDS)
def test_shards_of_shards_are_the_same_as_shards_of_the_source(
    tmp_path_factory: pytest.TempPathFactory,
    state: dict[str, torch.Tensor],
    first: int | None,
    second: int | None,
) -> None:
    folder = tmp_path_factory.mktemp("again")
    torch.save(state, folder / "big.bin")
    shardkit.convert(folder / "big.bin", folder / "first", max_shard=first, root=".", sync=False)
    shardkit.convert(folder / "first", folder / "second", max_shard=second, root=".", sync=False)
    assert shardkit.diff(folder / "big.bin", folder / "second", root=".").same
