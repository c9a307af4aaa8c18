"""What saves tensors through pointers gets them: of lazy tensors too, without holding them, and
never other bytes than theirs.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

from shardkit.checkpoint.entries import TensorEntry
from shardkit.dtypes import BY_CODE
from shardkit.errors import LoadError, Malformed
from shardkit.load import Paged, tensors
from shardkit.payloads.payload import Buffer, Concat, Extent, Literal
from truth import values


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    named = {
        "wide": torch.rand(3, 5, dtype=torch.float64),
        "half": torch.rand(6, 4).half(),
        "odd": torch.arange(7).byte(),
    }
    return named | {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "flags": torch.tensor([True, False]),
    }


def in_bytes(named: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: values(each) for name, each in named.items()}


def stored(tmp_path: Path, suffix: str) -> Path:
    path = tmp_path / f"source{suffix}"
    if suffix == ".safetensors":
        save_file(state(), path)
    else:
        torch.save(state(), path)
    return path


def content(tensor: torch.Tensor) -> bytes:
    """What a pointer to *tensor* leads to."""
    return ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())


DERIVED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "itself": lambda t: t,
    "a cast": lambda t: t.to(torch.bfloat16),
    "a stack": lambda t: torch.stack([t, t]),
    "rows": lambda t: t[1:],
    "one element": lambda t: t.view(-1)[-1],
    "turned and laid out anew": lambda t: t.t().contiguous(),
    "detached": lambda t: t.detach(),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("name", DERIVED)
def test_a_pointer_leads_to_the_values(name: str, suffix: str, tmp_path: Path) -> None:
    derive, weight = DERIVED[name], state()["half"]
    lazy = derive(tensors(stored(tmp_path, suffix))["half"])
    assert isinstance(lazy, Paged)
    assert content(lazy) == values(derive(weight))
    base = lazy.untyped_storage()
    assert lazy.data_ptr() == base.data_ptr() + lazy.storage_offset() * lazy.element_size()
    assert base.nbytes() == base.size() == len(base) == derive(weight).untyped_storage().nbytes()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_safetensors_saves_lazy_tensors_as_it_saves_their_values(
    suffix: str, tmp_path: Path
) -> None:
    lazy = tensors(stored(tmp_path, suffix))
    named = {name: lazy[name] for name in state()} | {"cast": lazy["half"].float()}
    save_file(named, tmp_path / "lazy.safetensors", metadata={"format": "pt"})
    save_file(
        state() | {"cast": state()["half"].float()},
        tmp_path / "same.safetensors",
        metadata={"format": "pt"},
    )
    assert (tmp_path / "lazy.safetensors").read_bytes() == (
        tmp_path / "same.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ties_are_found_by_their_storages(dtype: torch.dtype, tmp_path: Path) -> None:
    tied = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5, bias=False))
    tied[1].weight = tied[0].weight
    torch.save(tied.state_dict(), tmp_path / "tied.pt")
    lazy = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5, bias=False))
    lazy.load_state_dict(tensors(tmp_path / "tied.pt"), assign=True)
    save_model(lazy.to(dtype), str(tmp_path / "lazy.safetensors"))
    save_model(tied.to(dtype), str(tmp_path / "same.safetensors"))
    assert (tmp_path / "lazy.safetensors").read_bytes() == (
        tmp_path / "same.safetensors"
    ).read_bytes()


def test_what_is_asked_for_to_find_ties_reads_nothing() -> None:
    lazy = Paged.of(
        TensorEntry(("w",), BY_CODE["U8"], (8,), Concat((Literal(b"1234"), Literal(b"5678"))))
    )
    place = lazy.untyped_storage().data_ptr()
    assert ctypes.string_at(place, 8) == bytes(8)
    assert lazy.data_ptr() == place
    assert ctypes.string_at(place, 8) == b"12345678"


def test_what_is_in_memory_is_pointed_at_where_it_is() -> None:
    memory = bytearray(b"12345678")
    lazy = Paged.of(TensorEntry(("w",), BY_CODE["U8"], (8,), Buffer(memory)))
    assert lazy.data_ptr() == ctypes.addressof(ctypes.c_char.from_buffer(memory))


def test_a_storage_goes_with_the_last_tensor_that_has_it(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1000)}, tmp_path / "w.safetensors")
    lazy = tensors(tmp_path / "w.safetensors")["w"]
    cast = lazy.half()
    gc.collect()  # what earlier tests left
    before = open_files()
    assert content(lazy) == values(torch.ones(1000))
    assert content(cast) == values(torch.ones(1000).half())
    assert open_files() > before or sys.platform != "linux"
    del lazy, cast
    gc.collect()
    assert open_files() == before


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0


def test_many_casts_share_few_temporary_files(tmp_path: Path) -> None:
    save_file(
        {f"{number}": torch.full((9,), float(number)) for number in range(200)},
        tmp_path / "w.safetensors",
    )
    lazy = {name: each.double() for name, each in tensors(tmp_path / "w.safetensors").items()}
    before = open_files()
    assert all(
        content(each) == values(torch.full((9,), float(name)).double())
        for name, each in lazy.items()
    )
    assert open_files() <= before + 3


def test_a_file_that_is_replaced_while_it_is_saved_is_read_as_it_was(tmp_path: Path) -> None:
    path = stored(tmp_path, ".safetensors")
    lazy = tensors(path)
    named = {name: lazy[name] for name in state()} | {"cast": lazy["half"].float()}
    for each in named.values():
        # as who looks for ties among all weights, and then writes them file by file
        each.untyped_storage()
    save_file({"other": torch.zeros(100)}, path)
    save_file(named, tmp_path / "out.safetensors")
    assert in_bytes(load_file(tmp_path / "out.safetensors")) == in_bytes(
        state() | {"cast": state()["half"].float()}
    )


def test_a_model_can_be_saved_over_its_own_file(tmp_path: Path) -> None:
    path = stored(tmp_path, ".safetensors")
    lazy = tensors(path)
    save_file({name: lazy[name] for name in state()}, path)
    assert in_bytes(load_file(path)) == in_bytes(state())


CHANGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: os.truncate(path, 100),
    "emptied": lambda path: os.truncate(path, 0),
    "touched": lambda path: os.utime(path, ns=(1, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("asked", [True, False], ids=["asked before", "not asked before"])
@pytest.mark.parametrize("name", ["itself", "a cast"])
def test_a_file_that_was_written_to_is_an_error_that_names_it(
    name: str, asked: bool, change: str, tmp_path: Path
) -> None:
    path = stored(tmp_path, ".safetensors")
    lazy = DERIVED[name](tensors(path)["half"])
    if asked:
        lazy.untyped_storage()
    CHANGES[change](path)
    with pytest.raises(LoadError, match=r"source\.safetensors changed since it was opened"):
        lazy.data_ptr()


def test_another_file_of_the_same_name_is_not_taken_for_the_first(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(10)}, path)
    first = tensors(path)["w"]
    assert content(first) == values(torch.ones(10))
    save_file({"w": torch.zeros(10)}, path)
    second = tensors(path)["w"]
    assert content(second) == values(torch.zeros(10))
    assert content(first) == values(torch.ones(10))
    with pytest.raises(LoadError, match="changed since it was opened"):
        first.read()


def test_a_place_that_no_file_has_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(bytes(10))
    lazy = Paged.of(TensorEntry(("w",), BY_CODE["U8"], (20,), Extent(tmp_path / "w", 0, 20)))
    with pytest.raises(Malformed, match="ends before"):
        lazy.data_ptr()


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit of this kind")
def test_a_disk_without_room_is_a_sentence_that_says_what_to_do(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1000)}, tmp_path / "w.safetensors")
    code = (
        "import resource, signal, sys; from shardkit.load import tensors; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "weight = tensors(sys.argv[1])['w'].half(); resource.setrlimit(resource.RLIMIT_FSIZE, "
        "(1000, 1000)); "
        "from shardkit.errors import NoRoom\n"
        "try: weight.data_ptr()\n"
        "except NoRoom as error: print(error, error.hint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "w.safetensors")],
        capture_output=True,
        text=True,
    )
    assert "cannot be written: File too large" in done.stdout, done.stderr
    assert "TMPDIR" in done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_writes_to_other_temporary_files_than_its_parent(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1000), "b": torch.zeros(1000)}, tmp_path / "w.safetensors")
    lazy = tensors(tmp_path / "w.safetensors")
    first = lazy["a"].half()
    assert content(first) == values(torch.ones(1000).half())
    child = os.fork()
    if not child:
        zeros = lazy["b"].half()
        os._exit(
            not (
                content(zeros) == bytes(2000) and content(first) == values(torch.ones(1000).half())
            )
        )
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    second = lazy["a"].bfloat16()
    assert content(second) == values(torch.ones(1000).bfloat16())
