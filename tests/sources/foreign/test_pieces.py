"""What is a part of something: pieces of a split file, files of a distributed checkpoint,
unfinished downloads and runs.
"""

from __future__ import annotations

import io
import os
import shlex
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

import shardkit
from shardkit import __version__
from shardkit.cli import main
from shardkit.errors import FormatError, Malformed, UnknownFormat
from shardkit.metadata.unit_records import COMMIT, PLAN, Finished, PlanRecord, Request
from shardkit.sources.open import open as open_checkpoint
from shardkit.writing.transaction import Transaction
from shardkit.writing.unit_files import write_record

WEIGHTS = {"w": torch.arange(40000.0)}


def saved(tmp_path: Path, name: str) -> bytes:
    path = tmp_path / name
    if name.endswith(".safetensors"):
        save_file(WEIGHTS, path)
    else:
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=not name.startswith("legacy"))
    content = path.read_bytes()
    path.unlink()
    return content


def split(tmp_path: Path, whole: str, names: list[str]) -> list[Path]:
    content, size = saved(tmp_path, whole), 161_000 // len(names)
    folder = tmp_path / "pieces"
    folder.mkdir()
    pieces = [content[at * size : (at + 1) * size] for at in range(len(names) - 1)]
    pieces.append(content[(len(names) - 1) * size :])
    for name, piece in zip(names, pieces, strict=True):
        (folder / name).write_bytes(piece)
    return [folder / name for name in names]


def letters(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{chr(97 + at // 26)}{chr(97 + at % 26)}" for at in range(count)]


SPLIT = {
    "split's letters behind a word": ("m.bin", letters("m.bin.part-", 2)),
    "of a safetensors file": ("m.safetensors", letters("m.safetensors.part_", 3)),
    "of a legacy file": ("legacy.bin", letters("legacy.bin.part-", 2)),
    "split's letters alone": ("m.bin", letters("m.bin.", 2)),
    "split's default names": ("m.bin", letters("x", 2)),
    "split's default names, many": ("m.safetensors", letters("x", 30)),
    "numbers": ("m.bin", ["m.bin.001", "m.bin.002", "m.bin.003"]),
    "numbers from 0, many": ("m.bin", [f"m.bin.{number:02d}" for number in range(12)]),
    "numbers of several lengths": ("m.bin", [f"m.bin.part{number}" for number in range(1, 13)]),
    "numbers that say of how many": ("m.bin", ["m.bin.part1of2", "m.bin.part2of2"]),
    "in a name with a space": ("m.bin", letters("my model.bin.part-", 2)),
}


@pytest.mark.parametrize(("whole", "names"), SPLIT.values(), ids=SPLIT)
def test_a_piece_of_a_split_file_is_named_with_a_command_that_joins_it(
    whole: str, names: list[str], tmp_path: Path
) -> None:
    pieces = split(tmp_path, whole, names)
    hints = []
    for path in (pieces[0].parent, pieces[0], pieces[-1]):
        with pytest.raises(FormatError, match="split file") as caught:
            shardkit.open(path)
        hints.append(str(caught.value.hint))
    assert len(set(hints)) == 1
    assert "fetch" not in hints[0]
    if os.name == "posix":
        command = hints[0].removeprefix("join the pieces: ")
        subprocess.run(["bash", "-c", command], check=True)
        target = Path(shlex.split(command)[-1])
        assert target not in pieces
        assert shardkit.open(target)["w"].read() == WEIGHTS["w"].numpy().tobytes()


def test_the_command_writes_over_nothing(tmp_path: Path) -> None:
    (first, _) = split(tmp_path, "m.bin", letters("m.bin.part-", 2))
    first.with_name("m.bin").write_bytes(b"something that is not to be lost")
    with pytest.raises(FormatError) as caught:
        shardkit.open(first)
    assert str(caught.value.hint).endswith(f"> {first.with_name('joined-m.bin')}")


@pytest.mark.parametrize("left", [[0], [1], [0, 2], [1, 2]], ids=str)
def test_where_pieces_are_missing_it_is_said(left: list[int], tmp_path: Path) -> None:
    pieces = split(tmp_path, "m.bin", letters("m.bin.part-", 3))
    for at in {0, 1, 2} - set(left):
        pieces[at].unlink()
    with pytest.raises(
        FormatError, match="looks like one piece of a split file, and other pieces are not"
    ) as caught:
        shardkit.open(pieces[left[0]])
    assert "fetch the other pieces, and join all of them in their order: cat PIECES > " in str(
        caught.value.hint
    )


@pytest.mark.parametrize(
    "name",
    [
        "model.bin",
        "model.pt",
        "model.ab",
        "model.1",
        "pytorch_model-00001-of-00002.bin",
        "my_model_v2.pt",
        "xaver",
    ],
)
def test_a_broken_file_of_another_name_is_no_piece(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(saved(tmp_path, "m.bin")[:80_000])
    with pytest.raises(Malformed, match="or the download is incomplete"):
        shardkit.open(tmp_path / name)


def test_a_complete_file_may_be_called_like_a_piece(tmp_path: Path) -> None:
    for name in ("m.bin.part-aa", "m.bin.part-ab", "m.bin.001"):
        (tmp_path / name).write_bytes(saved(tmp_path, "m.bin"))
        assert list(shardkit.open(tmp_path / name)) == ["w"]


def test_a_piece_that_git_lfs_has_not_fetched_is_a_pointer(tmp_path: Path) -> None:
    for name in letters("m.bin.part-", 2):
        (tmp_path / name).write_bytes(
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 437\n"
        )
    with pytest.raises(UnknownFormat, match="is a git-lfs pointer"):
        shardkit.open(tmp_path / "m.bin.part-ab")


@pytest.mark.parametrize("suffix", ["incomplete", "crdownload", "part", "aria2"])
def test_an_unfinished_download_is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model.safetensors.{suffix}"
    path.write_bytes(saved(tmp_path, "m.safetensors")[:80_000])
    with pytest.raises(FormatError, match="is an unfinished download, by its name") as caught:
        shardkit.open(path)
    assert caught.value.hint == "finish the download, or download it again"


@pytest.fixture
def distributed(tmp_path: Path) -> Path:
    """What torch.distributed.checkpoint writes."""
    return distributed_of(
        {"model": {"w": torch.ones(6), "v": torch.ones(8)}, "step": 3}, tmp_path / "dcp"
    )


def distributed_of(state: dict[str, object], folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_distributed(state, checkpoint_id=str(folder))
    return folder


@pytest.mark.parametrize("name", ["", "__0_0.distcp", ".metadata"])
def test_a_distributed_checkpoint_is_named_and_not_called_damaged(
    name: str, distributed: Path
) -> None:
    with pytest.raises(FormatError, match=r"torch\.distributed\.checkpoint") as caught:
        shardkit.open(distributed / name)
    assert "damaged" not in f"{caught.value} {caught.value.hint}"
    assert f"dcp_to_torch {distributed} out.pt; then convert out.pt" in str(caught.value.hint)


def test_what_is_advised_for_a_distributed_checkpoint_works(distributed: Path) -> None:
    with pytest.raises(FormatError) as caught:
        shardkit.open(distributed)
    command = str(caught.value.hint).partition(": ")[2].partition(";")[0].split()
    assert command[0] == "python"
    subprocess.run(
        [sys.executable, *command[1:]], cwd=distributed.parent, check=True, capture_output=True
    )
    assert set(shardkit.open(distributed.parent / "out.pt")) == {"model.w", "model.v"}


def test_a_file_of_one_tensor_is_no_whole_checkpoint(tmp_path: Path) -> None:
    folder = distributed_of({"w": torch.ones(6)}, tmp_path / "one")
    for path in (folder, folder / "__0_0.distcp"):
        with pytest.raises(FormatError, match=r"torch\.distributed\.checkpoint"):
            shardkit.convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(shardkit.open(folder / "__0_0.distcp", format="torch-zip").tensors) == 1


def test_a_distributed_checkpoint_beside_a_file_of_torch_is_still_one(distributed: Path) -> None:
    torch.save(
        {"iteration": 3, "rng": torch.zeros(4)}, distributed / "common.pt"
    )  # as Megatron writes it
    with pytest.raises(FormatError, match=r"is a checkpoint of torch\.distributed\.checkpoint"):
        shardkit.open(distributed)
    save_file(WEIGHTS, distributed / "model.safetensors")
    assert list(shardkit.open(distributed)) == ["w"]


def test_a_distributed_checkpoint_without_its_metadata_is_unfinished(distributed: Path) -> None:
    (distributed / ".metadata").unlink()
    with pytest.raises(FormatError, match=r"without \.metadata: its writing was not finished"):
        shardkit.open(distributed)


def test_its_file_is_known_by_its_content_too(distributed: Path, tmp_path: Path) -> None:
    shutil.copy(distributed / "__0_0.distcp", tmp_path / "renamed.bin")
    with pytest.raises(FormatError, match="contains several zip archives in a row") as caught:
        shardkit.open(tmp_path / "renamed.bin")
    assert ".distcp" in str(caught.value.hint)


def test_zip_archives_without_zip64_one_behind_the_other_are_known(tmp_path: Path) -> None:
    one = io.BytesIO()
    with zipfile.ZipFile(one, "w") as archive:
        archive.writestr("a/data.pkl", "x")
    (tmp_path / "two.pt").write_bytes(2 * one.getvalue())
    with pytest.raises(Malformed, match=f"the last begins at byte {len(one.getvalue())}"):
        shardkit.open(tmp_path / "two.pt")


def partial(tmp_path: Path, *done: str) -> Path:
    path = source_of(tmp_path)
    request = Request("convert", str(path), {})
    plan = PlanRecord("digest", shardkit.open(path).files, "", __version__, request=request)
    with Transaction(tmp_path / "out", plan).begin() as transaction:
        for name in done:
            save_file(WEIGHTS, transaction.folder / name)
            nbytes = (transaction.folder / name).stat().st_size
            write_record(transaction.folder, plan.key, name, Finished(nbytes, None), sync=True)
    return transaction.folder


def source_of(tmp_path: Path) -> Path:
    torch.save(WEIGHTS, tmp_path / "big.bin")
    return tmp_path / "big.bin"


@pytest.mark.parametrize(("done", "said"), [((), "0 files"), (("model.safetensors",), "1 file")])
def test_an_unfinished_run_is_known_and_says_how_to_resume(
    done: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    folder = partial(tmp_path, *done)
    with pytest.raises(FormatError) as caught:
        shardkit.open(folder)
    assert (
        str(caught.value)
        == f"{folder}: holds the unfinished output of a run of shardkit: {said} complete"
    )
    again = (
        f"run the same conversion again (of '{tmp_path / 'big.bin'}', with "
        f"out='{tmp_path / 'out'}'): it resumes"
    )
    assert caught.value.hint == f"{again}; or delete this folder"
    shardkit.convert(tmp_path / "big.bin", tmp_path / "out")
    assert not folder.exists()


def test_an_unfinished_run_is_known_from_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(partial(tmp_path, "model.safetensors"))
    assert main(["inspect", "."]) == 1
    assert f"with -o {tmp_path / 'out'}): it resumes" in capsys.readouterr().err


def test_a_plan_that_cannot_be_read_is_still_one(tmp_path: Path) -> None:
    folder = partial(tmp_path)
    (folder / PLAN).write_bytes(b"\xff[" * 1000)
    with pytest.raises(FormatError, match="unfinished output"):
        shardkit.open(folder)


def test_an_output_that_was_only_not_cleared_up_is_read(tmp_path: Path) -> None:
    folder = partial(tmp_path, "model.safetensors")
    (folder / COMMIT).write_text("out\n")
    folder.rename(tmp_path / "out")
    assert list(open_checkpoint(tmp_path / "out")) == ["w"]


FOREIGN_FOLDERS = {
    "a folder of GGUF": ({"m.gguf": b"GGUF" + bytes(60)}, "'m.gguf' is a GGUF file", "original"),
    "a folder of HDF5": (
        {"config.json": b"{}", "model.h5": b"\x89HDF\r\n\x1a\n" + bytes(60)},
        "'model.h5' is an HDF5 file",
        "Keras",
    ),
    "a folder of ONNX": (
        {"config.json": b"{}", "model.onnx": b"\x08\x08\x12\x07pytorch" + bytes(60)},
        "'model.onnx' looks like an ONNX model",
        "made from",
    ),
    "a checkpoint of TensorFlow": (
        {
            "checkpoint": b'model_checkpoint_path: "model.ckpt-5"\n',
            "model.ckpt-5.index": bytes(50) + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb",
            "model.ckpt-5.data-00000-of-00001": bytes(range(1, 100)),
        },
        "'model.ckpt-5.data-00000-of-00001' holds weights of a TensorFlow checkpoint",
        "tf.train.load_checkpoint",
    ),
    "a SavedModel": (
        {"saved_model.pb": b"\x08\x01\x12\0"},
        "is a TensorFlow SavedModel",
        "TensorFlow",
    ),
    "a checkpoint of Orbax": (
        {"_METADATA": b"{}", "manifest.ocdbt": b"\x0c\xdb\x3a\x2a", "_sharding": b"{}"},
        "is a checkpoint of Orbax (JAX)",
        "orbax.checkpoint",
    ),
    "a Zarr store": ({".zgroup": b"{}"}, "is a Zarr store", "zarr"),
    "a distributed checkpoint of Paddle": (
        {
            "0_0.distcp": b"\x80\x04",
            "0.metadata": b"\x80\x04paddle.distributed.flex_checkpoint.metadata",
        },
        "is a distributed checkpoint of Paddle",
        "paddle.save",
    ),
    "a folder with nothing in it": (
        {},
        "holds no weights; it holds nothing",
        "pass the file or folder",
    ),
}


@pytest.mark.parametrize(
    ("files", "sentence", "advice"), FOREIGN_FOLDERS.values(), ids=FOREIGN_FOLDERS
)
def test_a_folder_of_what_is_not_read_is_named(
    files: dict[str, bytes], sentence: str, advice: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError) as caught:
        shardkit.open(tmp_path)
    assert sentence in str(caught.value)
    assert advice in str(caught.value.hint)


VERSIONS = [b"00", b"03", b"04", b"06", b"XX"]


@pytest.mark.parametrize("version", VERSIONS, ids=bytes.decode)
def test_an_archive_whose_first_bytes_were_overwritten_is_read_and_said(
    version: bytes, tmp_path: Path
) -> None:
    archive = io.BytesIO()
    torch.save(
        {"weight": WEIGHTS, "info": "3e_12s"}, archive
    )  # as GPT-SoVITS does, in process_ckpt.py
    (tmp_path / "voice.pth").write_bytes(version + archive.getvalue()[2:])
    checkpoint = shardkit.open(tmp_path / "voice.pth")
    assert checkpoint["weight.w"].read() == WEIGHTS["w"].numpy().tobytes()
    said = f"it begins with bytes '{version.decode()}' instead of 'PK', as GPT-SoVITS writes"
    assert any(said in note for note in checkpoint.notes)
    shardkit.convert(tmp_path / "voice.pth", tmp_path / "out", checksum="sha256")
    assert shardkit.verify(tmp_path / "out", tmp_path / "voice.pth").same


def test_an_archive_whose_first_bytes_were_overwritten_may_be_cut_off(tmp_path: Path) -> None:
    archive = io.BytesIO()
    torch.save(WEIGHTS, archive)
    (tmp_path / "voice.pth").write_bytes(b"03" + archive.getvalue()[2:80_000])
    with pytest.raises(UnknownFormat, match="GPT-SoVITS has replaced, and is cut off"):
        shardkit.open(tmp_path / "voice.pth")


def test_what_torch_mobile_reads_without_code_has_advice_of_its_own(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.script(torch.nn.Linear(3, 4))
        module._save_for_lite_interpreter(str(tmp_path / "m.ptl"))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    with (
        zipfile.ZipFile(tmp_path / "m.ptl") as whole,
        zipfile.ZipFile(tmp_path / "bare.ptl", "w") as bare,
    ):
        for name in whole.namelist():
            if "/code/" not in name:
                bare.writestr(name, whole.read(name))
    with pytest.raises(Malformed, match=r"which attributes of .* are weights") as caught:
        shardkit.open(tmp_path / "bare.ptl")
    assert "PyTorch Mobile" in str(caught.value.hint)


@pytest.mark.parametrize("flatbuffer", [False, True])
def test_what_torch_mobile_writes_is_read_or_named(flatbuffer: bool, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.script(torch.nn.Linear(3, 4))
        path = str(tmp_path / "m.ptl")
        module._save_for_lite_interpreter(path, _use_flatbuffer=flatbuffer)  # type: ignore[no-untyped-call]  # likewise
    if flatbuffer:
        with pytest.raises(UnknownFormat, match=r"is a flatbuffer of PyTorch Mobile \(\.ptl\)"):
            shardkit.open(tmp_path / "m.ptl")
    else:
        assert set(shardkit.open(tmp_path / "m.ptl")) == {"weight", "bias"}
