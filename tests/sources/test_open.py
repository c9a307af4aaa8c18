"""Opening a path: files, compressed files, indexes, folders, and what is none of these."""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import pickle
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from safetensors.torch import save_file

from shardkit.checkpoint.entries import Checkpoint
from shardkit.errors import FormatError, LimitExceeded, Malformed, PlanError, UnknownFormat
from shardkit.limits import Limits
from shardkit.sources.open import open as open_checkpoint

Tensors = Mapping[str, torch.Tensor]


def values(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {name: bytes(checkpoint[name].read()) for name in checkpoint}


def raw(tensors: Tensors) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def some(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.arange(6.0).reshape(2, 3) + position for position, name in enumerate(names)}


def shards(
    folder: Path,
    *,
    kind: str = "safetensors",
    parts: Mapping[str, Tensors],
    extra: Mapping[str, str] | None = None,
) -> Path:
    """A folder of shards as Hugging Face writes it; returns the index."""
    folder.mkdir(exist_ok=True)
    for name, tensors in parts.items():
        if kind == "safetensors":
            save_file(dict(tensors), folder / name, {"format": "pt"})
        else:
            torch.save(dict(tensors), folder / name)
    stem = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    weight_map = {key: name for name, tensors in parts.items() for key in tensors} | dict(
        extra or {}
    )
    (folder / f"{stem}.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
    return folder / f"{stem}.index.json"


def rewrite(index: Path, **weight_map: str | None) -> None:
    """Change places in *index*; None takes one out."""
    document = json.loads(index.read_text())
    places = document["weight_map"] | weight_map
    document["weight_map"] = {name: file for name, file in places.items() if file is not None}
    index.write_text(json.dumps(document))


TWO = {"m-1.safetensors": some("a", "b"), "m-2.safetensors": some("c")}
ALL = raw({**TWO["m-1.safetensors"], **TWO["m-2.safetensors"]})


# --- files


def test_a_file_is_recognised_by_content_whatever_it_is_called(tmp_path: Path) -> None:
    tensors = some("a", "b")
    save_file(tensors, tmp_path / "weights.bin")
    torch.save(tensors, tmp_path / "weights.safetensors")
    assert (
        open_checkpoint(tmp_path / "weights.bin").format,
        open_checkpoint(str(tmp_path / "weights.safetensors")).format,
    ) == (
        "safetensors",
        "torch-zip",
    )
    assert values(open_checkpoint(tmp_path / "weights.bin")) == raw(tensors)
    assert values(open_checkpoint(tmp_path / "weights.safetensors")) == raw(tensors)


def test_the_files_that_were_read_are_told(tmp_path: Path) -> None:
    save_file(some("a"), tmp_path / "m")
    (file,) = open_checkpoint(tmp_path / "m").files
    stat = os.stat(tmp_path / "m")
    assert (file.path, file.size, file.mtime_ns, file.inode) == (
        tmp_path / "m",
        stat.st_size,
        stat.st_mtime_ns,
        stat.st_ino,
    )


def test_a_format_that_is_named_is_not_questioned(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"x" * 100)
    with pytest.raises(UnknownFormat, match="is text and holds no weights"):
        open_checkpoint(tmp_path / "m", format="safetensors")
    with pytest.raises(PlanError, match="there is no format called 'gguf'"):
        open_checkpoint(tmp_path / "m", format="gguf")


def seekable(content: bytes, size: int) -> bytes:
    contents = [content[at : at + size] for at in range(0, len(content), size)]
    compressed = [zstandard.compress(each) for each in contents]
    lines = b"".join(
        len(c).to_bytes(4, "little") + len(e).to_bytes(4, "little")
        for c, e in zip(compressed, contents, strict=True)
    )
    table = lines + len(contents).to_bytes(4, "little") + b"\0" + bytes.fromhex("b1ea928f")
    return (
        b"".join(compressed) + bytes.fromhex("5e2a4d18") + len(table).to_bytes(4, "little") + table
    )


@pytest.mark.parametrize("save", [save_file, torch.save], ids=["safetensors", "torch"])
def test_a_compressed_file_is_read_like_the_file(tmp_path: Path, save: object) -> None:
    assert callable(save)
    tensors = {"a": torch.arange(5000.0), "b": torch.ones(3, dtype=torch.int8)}
    save(tensors, tmp_path / "m")
    content = (tmp_path / "m").read_bytes()
    (tmp_path / "m.zst").write_bytes(zstandard.compress(content))
    (tmp_path / "framed.zst").write_bytes(seekable(content, 777))
    plain = open_checkpoint(tmp_path / "m")
    for name in ("m.zst", "framed.zst"):
        packed = open_checkpoint(tmp_path / name, scratch=tmp_path)
        assert (packed.format, values(packed)) == (plain.format, raw(tensors))
        assert [file.path for file in packed.files] == [tmp_path / name]
        assert all(
            extent.path == tmp_path / name
            for entry in packed.tensors
            for extent in entry.payload.sources
        )
    assert {path.name for path in tmp_path.iterdir()} == {"m", "m.zst", "framed.zst"}


def test_a_compressed_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    save_file(some("a"), tmp_path / "m")
    (tmp_path / "m.zst").write_bytes(zstandard.compress((tmp_path / "m").read_bytes())[:-3])
    with pytest.raises(Malformed, match=r"m\.zst: broken zstd data: it ends at byte"):
        open_checkpoint(tmp_path / "m.zst")


# --- what is no file


class FullDisk(io.FileIO):
    """A file with room for half a checkpoint."""

    def write(self, content: Any) -> int:  # Any: what torch gives, which differs
        if self.tell() + len(content) > 5_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(content)


def test_what_a_failed_save_of_torch_leaves_is_said_to_be_incomplete(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with pytest.raises((OSError, RuntimeError)), FullDisk(path, "w") as file:
        torch.save({"weight": torch.ones(2_000)}, file)
    with pytest.raises(Malformed, match="the program that wrote it was interrupted, or") as caught:
        open_checkpoint(path)
    assert "save it again or use an earlier checkpoint" in str(caught.value.hint)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        torch.save({"weight": torch.ones(2_000), "function": lambda: None}, path)
    with pytest.raises(UnknownFormat, match=r"was left by a torch\.save that failed"):
        open_checkpoint(path)


def test_a_path_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="nowhere: cannot be read: No such file or directory"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FormatError, match="is not a path"):
        open_checkpoint("a\0b")
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(FormatError, match="Not a directory"):
        open_checkpoint(tmp_path / "a" / "b")


@pytest.mark.timeout(120)
def test_a_pipe_a_socket_and_a_device_never_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "sock"))
        for path, kind in [
            (tmp_path / "pipe", "a pipe"),
            (tmp_path / "sock", "a socket"),
            (Path(os.devnull), "a device"),
        ]:
            with pytest.raises(
                FormatError, match=f"is {kind}, and only files and folders can be read"
            ):
                open_checkpoint(path)
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="is a pipe"):
        open_checkpoint(tmp_path)


def test_a_link_to_nothing_names_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "m").symlink_to("../../blobs/0123")
    with pytest.raises(
        FormatError, match=r"is a link to \.\./\.\./blobs/0123, which does not exist"
    ) as caught:
        open_checkpoint(tmp_path / "m")
    assert caught.value.hint == "finish the download, and try again"
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(FormatError, match="circle"):
        open_checkpoint(tmp_path / "circle")


# --- folders without an index


def test_a_folder_with_one_weights_file_is_that_file(tmp_path: Path) -> None:
    save_file(some("a"), tmp_path / "odd name")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("# a model")
    (tmp_path / "onnx").mkdir()
    save_file(some("hidden"), tmp_path / ".hidden.safetensors")
    assert list(open_checkpoint(tmp_path)) == ["a"]


def test_a_compressed_file_is_the_one_of_a_folder(tmp_path: Path) -> None:
    save_file(some("a"), tmp_path / "m")
    (tmp_path / "m.zst").write_bytes(zstandard.compress((tmp_path / "m").read_bytes()))
    (tmp_path / "m").unlink()
    assert list(open_checkpoint(tmp_path)) == ["a"]


def test_safetensors_is_preferred_to_a_pickle_of_the_same_model(tmp_path: Path) -> None:
    save_file(some("a"), tmp_path / "model.safetensors")
    torch.save(some("b"), tmp_path / "pytorch_model.bin")
    torch.save(some("c"), tmp_path / "optimizer.pt")
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint) == ["a"]
    assert checkpoint.notes == ()
    assert [(part.path, part.reason) for part in checkpoint.left_out] == [
        ("optimizer.pt", "optimizer state"),
        ("pytorch_model.bin", "'model.safetensors' comes first"),
    ]


def test_a_file_without_tensors_is_no_rival(tmp_path: Path) -> None:
    save_file(some("a"), tmp_path / "adapter_model.safetensors")
    torch.save({"learning_rate": 1e-4}, tmp_path / "training_args.bin")
    assert list(open_checkpoint(tmp_path)) == ["a"]


def test_several_files_without_an_index_are_listed(tmp_path: Path) -> None:
    for number in range(12):
        save_file(some("a"), tmp_path / f"model-{number:02}.safetensors")
    with pytest.raises(UnknownFormat, match="holds 12 files with weights and no index") as caught:
        open_checkpoint(tmp_path)
    assert "'model-07.safetensors' and 4 more" in str(caught.value)
    assert "fetch its *.index.json" in str(caught.value.hint)


def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(UnknownFormat, match=r"holds no weights; it holds nothing"):
        open_checkpoint(tmp_path)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UnknownFormat, match=r"it holds 'model_index\.json', 'scheduler'") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.hint == "pass the file or folder that holds the weights"


def test_a_folder_of_pointers_names_the_pointer(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n"
    )
    with pytest.raises(UnknownFormat, match=r"model\.safetensors: is a git-lfs pointer"):
        open_checkpoint(tmp_path)


def test_a_broken_file_of_a_folder_is_named(tmp_path: Path) -> None:
    save_file(some("a"), tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(
        Malformed, match=r"model\.safetensors: the tensors need 24 bytes, and 23 are there"
    ):
        open_checkpoint(tmp_path)


def test_a_folder_called_like_a_file_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.bin").mkdir()
    with pytest.raises(UnknownFormat, match=r"x\.bin: holds no weights"):
        open_checkpoint(tmp_path / "x.bin")


# --- Hugging Face caches


def cached(tmp_path: Path, index: Path) -> Path:
    """The folder of *index* as a snapshot in a cache: links into ../../blobs."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in index.parent.iterdir():
        blob = blobs / f"blob-of-{path.name.replace('.', '-')}"
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    return snapshot


def test_a_snapshot_of_links_is_a_folder_like_any_other(tmp_path: Path) -> None:
    snapshot = cached(tmp_path, shards(tmp_path / "m", parts=TWO))
    checkpoint = open_checkpoint(snapshot)
    assert values(checkpoint) == ALL
    assert {file.path.parent for file in checkpoint.files} == {snapshot}
    assert values(open_checkpoint(snapshot / "model.safetensors.index.json")) == ALL


def test_the_entry_of_a_cache_says_where_its_snapshots_are(tmp_path: Path) -> None:
    snapshot = cached(tmp_path, shards(tmp_path / "m", parts=TWO))
    with pytest.raises(UnknownFormat) as caught:
        open_checkpoint(snapshot.parent.parent)
    assert str(snapshot.parent) in str(caught.value.hint)


def test_a_snapshot_whose_blobs_are_missing_lists_them(tmp_path: Path) -> None:
    snapshot = cached(tmp_path, shards(tmp_path / "m", parts=TWO))
    (tmp_path / "models--a--b" / "blobs" / "blob-of-m-2-safetensors").unlink()
    with pytest.raises(
        Malformed, match=r"1 of the 2 files that it lists is missing: 'm-2\.safetensors'"
    ):
        open_checkpoint(snapshot)


# --- indexes


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_of_either_kind_are_one_checkpoint(tmp_path: Path, kind: str) -> None:
    index = shards(tmp_path, kind=kind, parts=TWO)
    for path in (tmp_path, index):
        checkpoint = open_checkpoint(path)
        assert values(checkpoint) == ALL
        assert [file.path.name for file in checkpoint.files] == [
            index.name,
            "m-1.safetensors",
            "m-2.safetensors",
        ]
        assert checkpoint.notes == ()
        assert checkpoint.format == {"safetensors": "safetensors", "bin": "torch-zip"}[kind]


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.safetensors.index.json",
        "other.json",
    ],
)
def test_an_index_of_another_name_is_one(tmp_path: Path, name: str) -> None:
    shards(tmp_path, parts=TWO).rename(tmp_path / name)
    assert values(open_checkpoint(tmp_path / name)) == ALL


def test_shards_may_lie_in_folders_and_be_compressed(tmp_path: Path) -> None:
    index = shards(tmp_path, parts={"m-1.safetensors": some("a")})
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "m.zst").write_bytes(
        zstandard.compress((tmp_path / "m-1.safetensors").read_bytes())
    )
    rewrite(index, a="sub/m.zst")
    assert values(open_checkpoint(index)) == raw(some("a"))


def test_shards_of_two_formats_are_one_checkpoint(tmp_path: Path) -> None:
    index = shards(tmp_path, parts=TWO)
    torch.save(dict(TWO["m-2.safetensors"]), tmp_path / "m-2.safetensors")
    assert (open_checkpoint(index).format, values(open_checkpoint(index))) == (
        "safetensors + torch-zip",
        ALL,
    )


def test_the_index_of_safetensors_is_preferred(tmp_path: Path) -> None:
    shards(tmp_path, parts=TWO)
    shards(tmp_path, kind="bin", parts={"p.bin": some("z")})
    checkpoint = open_checkpoint(tmp_path)
    assert values(checkpoint) == ALL
    assert [(part.path, part.reason) for part in checkpoint.left_out] == [
        ("p.bin", "in 'pytorch_model.bin.index.json'; 'model.safetensors.index.json' comes first")
    ]


def test_the_index_of_a_variant_is_read_only_where_it_is_given(tmp_path: Path) -> None:
    index = shards(tmp_path, parts=TWO)
    save_file(some("a"), tmp_path / "half.safetensors")
    variant = tmp_path / "model.safetensors.index.fp16.json"
    variant.write_text(json.dumps({"weight_map": {"a": "half.safetensors"}}))
    assert values(open_checkpoint(tmp_path)) == ALL
    assert values(open_checkpoint(variant)) == raw(some("a"))
    index.unlink()
    with pytest.raises(UnknownFormat, match="no index that joins them"):
        open_checkpoint(tmp_path)


def test_all_missing_shards_are_counted_and_the_first_named(tmp_path: Path) -> None:
    index = shards(tmp_path, parts=TWO)
    rewrite(index, **{f"t{number}": f"gone-{number:02}.safetensors" for number in range(20)})
    with pytest.raises(
        Malformed,
        match=r"20 of the 22 files that it lists are missing: 'gone-00\.safetensors', .* and 12 "
        r"more",
    ):
        open_checkpoint(index)


DISAGREEMENTS: dict[str, tuple[dict[str, str | None], str]] = {
    "a shard of another model": (
        {"a": None, "b": None, "x": "m-1.safetensors", "y": "m-1.safetensors"},
        (
            "tensor 'x': no shard contains it, nor anything else that the index expects in "
            "'m-1.safetensors'"
        ),
    ),
    "a shard that is a folder": (
        {"a": "sub"},
        "sub: is a folder, and only files and folders can be read",
    ),
    "a shard that is a text": ({"a": "text.txt"}, "text.txt: is text and holds no weights"),
    "a shard that is the index": ({"a": "model.safetensors.index.json"}, "is JSON text"),
    "a name that escapes": ({"a": "../m-1.safetensors"}, "leads out of the folder of the index"),
}


@pytest.mark.parametrize(("changes", "sentence"), DISAGREEMENTS.values(), ids=DISAGREEMENTS)
def test_an_index_that_disagrees_with_its_shards_is_refused(
    tmp_path: Path, changes: dict[str, str | None], sentence: str
) -> None:
    index = shards(tmp_path, parts=TWO)
    (tmp_path / "sub").mkdir()
    (tmp_path / "text.txt").write_text("nothing but a text\n")
    rewrite(index, **changes)
    with pytest.raises(FormatError, match=re.escape(sentence)):
        open_checkpoint(index)


def test_a_tensor_that_the_index_does_not_list_is_taken_and_noted(tmp_path: Path) -> None:
    index = shards(tmp_path, parts=TWO)
    rewrite(index, b=None)
    checkpoint = open_checkpoint(index)
    assert values(checkpoint) == ALL
    assert checkpoint.notes == (
        "'b': in 'm-1.safetensors' and not in the index; converted all the same",
    )


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        (
            {"x": "m-1.safetensors", "y": "m-2.safetensors"},
            (
                "the index lists 'x', 'y', which no shard contains; a tied weight or a buffer need "
                "not be stored"
            ),
        ),
        (
            {"a": "m-2.safetensors", "c": "m-1.safetensors"},
            "'a', 'c': in another shard than the index says; read from where it is",
        ),
    ],
    ids=["names that no shard contains", "names in other shards"],
)
def test_what_the_shards_hold_counts_and_not_where_the_index_looks_for_it(
    tmp_path: Path, changes: dict[str, str | None], note: str
) -> None:
    index = shards(tmp_path, parts=TWO)
    rewrite(index, **changes)
    checkpoint = open_checkpoint(index)
    assert values(checkpoint) == ALL
    assert checkpoint.notes == (note,)


def test_a_tensor_in_two_shards_is_taken_from_where_the_index_says(tmp_path: Path) -> None:
    index = shards(
        tmp_path, parts={"m-1.safetensors": some("x", "a"), "m-2.safetensors": some("a", "b")}
    )
    checkpoint = open_checkpoint(index)
    assert [entry.name for entry in checkpoint.tensors] == ["x", "a", "b"]
    assert checkpoint["a"].payload.sources[0].path.name == "m-2.safetensors"
    assert [(part.path, part.nbytes, part.reason) for part in checkpoint.left_out] == [
        ("m-1.safetensors", 24, "'a': read from 'm-2.safetensors', which has it too")
    ]


@pytest.mark.parametrize("listed", [True, False])
def test_a_recorded_tie_may_stand_in_the_index_or_not(tmp_path: Path, listed: bool) -> None:
    index = shards(tmp_path, parts=TWO, extra={"tied.a": "m-1.safetensors"} if listed else {})
    save_file(
        dict(TWO["m-1.safetensors"]), tmp_path / "m-1.safetensors", {"format": "pt", "tied.a": "a"}
    )
    checkpoint = open_checkpoint(index)
    assert checkpoint["tied.a"].payload == checkpoint["a"].payload
    assert checkpoint.notes == ()


def test_metadata_is_merged_and_the_first_wins(tmp_path: Path) -> None:
    index = shards(tmp_path, parts=TWO)
    save_file(
        dict(TWO["m-1.safetensors"]), tmp_path / "m-1.safetensors", {"format": "pt", "by": "first"}
    )
    save_file(
        dict(TWO["m-2.safetensors"]),
        tmp_path / "m-2.safetensors",
        {"format": "pt", "by": "second", "only": "here"},
    )
    checkpoint = open_checkpoint(index)
    assert checkpoint.metadata == {"format": "pt", "by": "first", "only": "here"}
    assert checkpoint.notes == (
        "the shards differ in their metadata 'by'; that of the first was taken",
    )


def test_an_index_beyond_the_limits_is_refused(tmp_path: Path) -> None:
    index = shards(tmp_path, parts=TWO)
    for limits, limit in [
        (Limits(header_bytes=50), "header_bytes"),
        (Limits(tensors=2), "tensors"),
    ]:
        with pytest.raises(LimitExceeded) as caught:
            open_checkpoint(index, limits=limits)
        assert caught.value.limit == limit


def test_an_index_cut_anywhere_gives_a_sentence(tmp_path: Path) -> None:
    index = shards(tmp_path, parts={"m.safetensors": some("a")})
    content = index.read_bytes()
    for length in range(len(content)):
        index.write_bytes(content[:length])
        with pytest.raises(FormatError):
            open_checkpoint(index)


def test_the_collector_of_cycles_is_left_as_it_was(tmp_path: Path) -> None:
    save_file(some("a"), tmp_path / "m")
    open_checkpoint(tmp_path / "m")
    with pytest.raises(FormatError):
        open_checkpoint(tmp_path / "nowhere")
    assert gc.isenabled()
