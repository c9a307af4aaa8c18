"""Which weights of a folder are the model, and what of the rest is reported."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
import zstandard
from safetensors.torch import save_file

import shardkit
from shardkit.errors import FormatError, Malformed, UnknownFormat
from shardkit.sources.format import Source

Content = int | Sequence[str] | str | bytes
Layout = Mapping[str, Content]


def build(folder: Path, layout: Layout) -> Path:
    """A folder of files by their names: a tensor filled with a number, an index of shards, or
    content.
    """
    for name, what in layout.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        match what:
            case int():
                tensors = {f"{what}.weight": torch.full((2, 2), float(what))}
                save = save_file if ".safetensors" in name else torch.save
                save(tensors, path)
            case str():
                path.write_text(what)
            case bytes():
                path.write_bytes(what)
            case _:
                weight_map = {f"{layout.get(shard, shard)!s}.weight": shard for shard in what}
                path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
BINS = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
SAFE_SET: Layout = {"model.safetensors.index.json": SHARDS, SHARDS[0]: 11, SHARDS[1]: 12}
BIN_SET: Layout = {"pytorch_model.bin.index.json": BINS, BINS[0]: 21, BINS[1]: 22}
STALE: Layout = {"model.safetensors.index.json": SHARDS}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n"

# What is there, which of it is read, and what is left out.
CHOICES: dict[str, tuple[Layout, list[int], list[str]]] = {
    "a single file before its index": (
        {"model.safetensors": 1, **SAFE_SET},
        [1],
        ["model-*-of-00002.safetensors"],
    ),
    "safetensors before .bin": ({"model.safetensors": 1, "pytorch_model.bin": 2}, [1], ["pytorch_model.bin"]),
    "safetensors before an index of .bin": (
        {"model.safetensors": 1, **BIN_SET},
        [1],
        ["pytorch_model-*-of-00002.bin"],
    ),
    "an index of safetensors before .bin": ({**SAFE_SET, "pytorch_model.bin": 2}, [11, 12], ["pytorch_model.bin"]),
    "a .bin before its index": ({"pytorch_model.bin": 2, **BIN_SET}, [2], ["pytorch_model-*-of-00002.bin"]),
    "a stale index beside a whole file": (
        {"model.safetensors": 1, **STALE},
        [1],
        ["model.safetensors.index.json"],
    ),
    "a stale index before a whole .bin": (
        {"pytorch_model.bin": 2, **STALE},
        [2],
        ["model.safetensors.index.json"],
    ),
    "an index of which a shard is missing": (
        {"model.safetensors.index.json": SHARDS, SHARDS[0]: 11, **BIN_SET},
        [21, 22],
        [SHARDS[0], "model.safetensors.index.json"],
    ),
    "an index that is cut off": (
        {"model.safetensors": 1, "pytorch_model.bin.index.json": '{"weight_map": {'},
        [1],
        ["pytorch_model.bin.index.json"],
    ),
    "the names of diffusers": (
        {
            "diffusion_pytorch_model.safetensors": 1,
            "diffusion_pytorch_model.bin": 2,
            "diffusion_pytorch_model.fp16.safetensors": 3,
        },
        [1],
        ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"],
    ),
    "a variant beside the default": (
        {"model.safetensors": 1, "model.fp16.safetensors": 3},
        [1],
        ["model.fp16.safetensors"],
    ),
    "a plain file beside itself compressed": (
        {"model.safetensors": 1, "model.safetensors.zst": zstandard.compress(b"x" * 99)},
        [1],
        ["model.safetensors.zst"],
    ),
    "a variant alone": ({"model.fp16.safetensors": 3}, [3], []),
    "an index of a variant alone": (
        {"model.safetensors.index.fp16.json": SHARDS, SHARDS[0].replace("-", ".fp16-", 1): 9, SHARDS[0]: 7, SHARDS[1]: 8},
        [7, 8],
        ["model.fp16-00001-of-00002.safetensors"],
    ),
    "a pointer of git-lfs before a whole .bin": (
        {"model.safetensors": POINTER, "pytorch_model.bin": 2},
        [2],
        ["model.safetensors"],
    ),
    "a projector, an adapter, a second model": (
        {"model.safetensors": 1, "projector.safetensors": 4, "adapter_model.safetensors": 5, "model_1.safetensors": 6},
        [1],
        ["adapter_model.safetensors", "model_1.safetensors", "projector.safetensors"],
    ),
    "consolidated weights beside shards": ({**SAFE_SET, "consolidated.safetensors": 4}, [11, 12], ["consolidated.safetensors"]),
    "the state of a trainer": (
        {"odd.bin": 1, "optimizer.pt": 5, "scheduler.pt": 6, "rng_state.pth": 7, "training_args.bin": 8},
        [1],
        ["optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin"],
    ),
    "an adapter in two formats": (
        {"adapter_model.safetensors": 1, "adapter_model.bin": 2, "optimizer.pt": 3},
        [1],
        ["adapter_model.bin", "optimizer.pt"],
    ),
    "a set without an index": ({SHARDS[0]: 11, SHARDS[1]: 12}, [11, 12], []),
    "a set of .bin without an index": ({BINS[0]: 21, BINS[1]: 22, "optimizer.bin": 3}, [21, 22], ["optimizer.bin"]),
    "a set without an index beside a stale index": (
        {"pytorch_model.bin.index.json": BINS, SHARDS[0]: 11, SHARDS[1]: 12},
        [11, 12],
        ["pytorch_model.bin.index.json"],
    ),
    "subfolders": (
        {"model.safetensors": 1, "2_Dense/model.safetensors": 2, "a/b/original/consolidated.00.pth": 3, "a/readme": "x"},
        [1],
        ["2_Dense/", "a/b/original/"],
    ),
    "one part of a tensor-parallel model, which is all of it": ({"consolidated.00.pth": 1, "params.json": "{}"}, [1], []),
    "formats that nothing reads": (
        {"model.safetensors": 1, "q4.gguf": b"GGUF" + bytes(30), "tf_model.h5": bytes(30), "onnx/m.onnx": b"\x08\7x"},
        [1],
        ["onnx/", "q4.gguf", "tf_model.h5"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "read", "left_out"), CHOICES.values(), ids=CHOICES)
def test_the_first_complete_candidate_is_read_and_the_rest_is_reported(
    layout: Layout, read: list[int], left_out: list[str], tmp_path: Path
) -> None:
    checkpoint = shardkit.open(build(tmp_path / "model", layout))
    assert [
        torch.frombuffer(each.read(), dtype=torch.float32)[0].item() for each in checkpoint.tensors
    ] == read
    assert [part.path for part in checkpoint.left_out] == left_out
    assert all(part.nbytes > 0 and part.reason for part in checkpoint.left_out)
    for part in checkpoint.left_out:
        if "*" not in part.path:
            assert (tmp_path / "model" / part.path).exists()


@pytest.mark.parametrize(
    "name",
    [
        "a single file before its index",
        "safetensors before .bin",
        "safetensors before an index of .bin",
        "an index of safetensors before .bin",
        "a .bin before its index",
        "a stale index beside a whole file",
        "an index that is cut off",
        "a variant beside the default",
    ],
)
def test_transformers_reads_the_same_file(name: str, tmp_path: Path) -> None:
    modeling = pytest.importorskip("transformers.modeling_utils")
    layout, read, _ = CHOICES[name]
    files, _ = modeling._get_resolved_checkpoint_files(
        pretrained_model_name_or_path=str(build(tmp_path, layout)),
        variant=None,
        gguf_file=None,
        use_safetensors=None,
        user_agent=None,
        is_remote_code=False,
        download_kwargs={},
    )
    found = [shardkit.open(file) for file in files]
    assert [entry.name for each in found for entry in each.tensors] == [
        f"{number}.weight" for number in read
    ]


REFUSALS: dict[str, tuple[Layout, type[FormatError], str, str]] = {
    "a shard of an index is missing": (
        {"model.safetensors.index.json": SHARDS, SHARDS[0]: 11},
        Malformed,
        "1 of the 2 files that it lists is missing: 'model-00002-of-00002.safetensors'",
        "finish the download",
    ),
    "a shard is missing and a variant is there": (
        {"model.safetensors.index.json": SHARDS, SHARDS[0]: 11, "model.fp16.safetensors": 3},
        Malformed,
        "is missing",
        "model.fp16.safetensors",
    ),
    "numbered shards are missing": (
        {"model-00002-of-00004.safetensors": 1, "model-00003-of-00004.safetensors": 2},
        Malformed,
        "are missing: 'model-00001-of-00004.safetensors', 'model-00004-of-00004.safetensors'",
        "finish the download",
    ),
    "one name in two shards without an index": (
        {SHARDS[0]: 11, SHARDS[1]: 11},
        Malformed,
        (
            "tensor '11.weight': is in 'model-00001-of-00002.safetensors' and in "
            "'model-00002-of-00002.safetensors'"
        ),
        "write an index",
    ),
    "tensor-parallel parts": (
        {"consolidated.00.pth": 1, "consolidated.01.pth": 2, "params.json": "{}"},
        UnknownFormat,
        "holds the parts of 2 ranks: 'consolidated.00.pth', 'consolidated.01.pth'",
        "merge them",
    ),
    "the state of a trainer beside a distributed model": (
        {
            "random_states_0.pkl": 1,
            "optimizer_0/__0_0.distcp": bytes(999),
            "pytorch_model_fsdp_0/__0_0.distcp": bytes(9),
        },
        UnknownFormat,
        "holds the state of a trainer and no model: 'random_states_0.pkl' (random-number state)",
        "pytorch_model_fsdp_0",
    ),
    "a pipeline": (
        {
            "model_index.json": "{}",
            "scheduler/config.json": "{}",
            "unet/m.safetensors": 1,
            "vae/m.safetensors": 2,
        },
        UnknownFormat,
        "holds weights in subfolders only: 'unet/', 'vae/'",
        os.path.join("model", "unet"),
    ),
    "the steps of a run": (
        {"checkpoint-500/model.safetensors": 1, "checkpoint-1000/model.safetensors": 2},
        UnknownFormat,
        "holds weights in subfolders only",
        "checkpoint-1000",
    ),
    "several files of other names": (
        {"b.safetensors": 1, "b-ema.safetensors": 2},
        UnknownFormat,
        "holds 2 files with weights and no index",
        os.path.join("model", "b.safetensors"),
    ),
    "two sets of other names": (
        {"a-1-of-2.bin": 1, "a-2-of-2.bin": 2, "b-1-of-2.bin": 3, "b-2-of-2.bin": 4},
        UnknownFormat,
        "holds 2 sets of shards: 'a-*-of-2.bin', 'b-*-of-2.bin'",
        "move the others away",
    ),
}


@pytest.mark.parametrize(("layout", "kind", "sentence", "hint"), REFUSALS.values(), ids=REFUSALS)
def test_a_folder_without_a_model_says_what_is_wrong_and_what_to_give(
    layout: Layout, kind: type[FormatError], sentence: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(kind) as caught:
        shardkit.open(build(tmp_path / "model", layout))
    assert sentence in str(caught.value)
    assert hint in str(caught.value.hint)


def test_loaders_that_would_read_other_weights_are_named(tmp_path: Path) -> None:
    checkpoint = shardkit.open(build(tmp_path, {"model.safetensors": 1, **SAFE_SET}))
    (note,) = checkpoint.notes
    assert (
        "'model.safetensors' was read, and not the 2 shards of 'model.safetensors.index.json'"
        in note
    )


@pytest.mark.parametrize("with_index", [True, False], ids=["index", "no index"])
def test_the_shards_of_an_adapter_are_read_alone_and_beside_a_model_they_are_no_rival(
    with_index: bool, tmp_path: Path
) -> None:
    shards = [name.replace("model", "adapter_model") for name in SHARDS]
    layout: dict[str, Content] = {shards[0]: 31, shards[1]: 32}
    if with_index:
        layout["adapter_model.safetensors.index.json"] = shards
    adapter = build(tmp_path, layout)
    assert list(shardkit.open(adapter)) == ["31.weight", "32.weight"]
    found = shardkit.open(build(tmp_path, {"model.safetensors": 1}))
    assert list(found) == ["1.weight"]
    assert found.notes == ()
    (part,) = found.left_out
    assert part.path == "adapter_model-*-of-00002.safetensors"
    assert part.reason == "2 shards; an adapter, which is applied on top of a model"


def test_a_set_that_is_joined_without_an_index_says_so(tmp_path: Path) -> None:
    (note,) = shardkit.open(build(tmp_path, {SHARDS[0]: 11, SHARDS[1]: 12})).notes
    assert "there is no index: the 2 shards of 'model-*-of-00002.safetensors' were joined" in note


@pytest.mark.parametrize(
    ("names", "left_out", "sentence"),
    [
        (SHARDS, [SHARDS[1]], "is shard 1 of 2 and holds only a part of the model"),
        (SHARDS[:1], [], "the others are missing"),
        (["model-00001-of-00001.safetensors"], [], None),
    ],
)
def test_a_shard_that_is_given_alone_is_a_part(
    names: list[str], left_out: list[str], sentence: str | None, tmp_path: Path
) -> None:
    build(tmp_path, dict.fromkeys(names, 1))
    checkpoint = shardkit.open(tmp_path / names[0])
    assert [part.path for part in checkpoint.left_out] == left_out
    assert len(checkpoint.notes) == (sentence is not None)
    assert all(str(sentence) in note for note in checkpoint.notes)


def test_a_flat_index_and_dots_in_names_are_read(tmp_path: Path) -> None:
    build(tmp_path, {"a.safetensors": 1, "b.safetensors": 2})
    (tmp_path / "x.index.json").write_text(
        json.dumps({"1.weight": "./a.safetensors", "2.weight": "b.safetensors"})
    )
    assert list(shardkit.open(tmp_path)) == ["1.weight", "2.weight"]
    assert shardkit.open(tmp_path).left_out == ()
    (tmp_path / "x.index.json").rename(tmp_path / "any.json")
    assert list(shardkit.open(tmp_path / "any.json")) == ["1.weight", "2.weight"]


def test_a_file_given_by_itself_answers_for_itself_alone(tmp_path: Path) -> None:
    build(tmp_path, {"model.safetensors": 1, "pytorch_model.bin": 2})
    assert shardkit.open(tmp_path / "pytorch_model.bin").left_out == ()


def test_what_is_left_out_is_in_every_report(tmp_path: Path) -> None:
    layout: Layout = {"model.safetensors": 1, "unet/model.safetensors": 2, "config.json": "{}"}
    source = build(tmp_path / "model", layout)
    (part,) = shardkit.open(source).left_out
    assert part.path == "unet/"
    assert part.nbytes == (source / "unet" / "model.safetensors").stat().st_size
    assert shardkit.convert(source, tmp_path / "out").left_out == (part,)
    assert shardkit.offload_prep(source, tmp_path / "prepared").left_out == (part,)


def test_a_comparison_lists_what_it_did_not_cover(tmp_path: Path) -> None:
    layout: Layout = {"model.safetensors": 1, "unet/model.safetensors": 2, "config.json": "{}"}
    source = build(tmp_path / "model", layout)
    shardkit.convert(source, tmp_path / "out")
    build(tmp_path / "out", {"extra.bin": 3})
    expected = [str(tmp_path / "model" / "unet") + "/", str(tmp_path / "out" / "extra.bin")]
    for comparison in (
        shardkit.verify(tmp_path / "out", source),
        shardkit.diff(source, tmp_path / "out"),
    ):
        assert comparison.same
        assert [part.path for part in comparison.left_out] == expected
        assert (
            sum(
                "files beside the weights are not compared: 'config.json'" in note
                for note in comparison.notes
            )
            == 2
        )
    alone = shardkit.verify(tmp_path / "out")
    assert [part.path for part in alone.left_out] == expected[1:]
    assert alone.unchecked == 1


def test_what_the_other_side_read_was_compared(tmp_path: Path) -> None:
    source = build(
        tmp_path, {"model.safetensors": 1, "pytorch_model.bin": 1, "unet/model.safetensors": 1}
    )
    for other in ("pytorch_model.bin", "unet"):
        left_out = shardkit.diff(source, source / other).left_out
        assert [Path(part.path).name for part in left_out] == [
            {"unet": "pytorch_model.bin"}.get(other, "unet")
        ]


def test_objects_in_a_file_are_named_under_its_path(tmp_path: Path) -> None:
    optimizer = {
        "state": {0: {"exp_avg": torch.zeros(100)}},
        "param_groups": [{"lr": 0.1, "params": [0]}],
    }
    file = tmp_path / "run.pt"
    torch.save({"model": {"w.weight": torch.ones(2)}, "optimizer": optimizer}, file)
    shardkit.convert(file, tmp_path / "out")
    (part,) = shardkit.verify(tmp_path / "out", file).left_out
    assert (part.path, part.nbytes, part.reason) == (f"{file}: optimizer", 400, "optimizer state")


def test_a_manifest_tells_which_files_it_does_not_cover(tmp_path: Path) -> None:
    source = build(tmp_path / "model", {SHARDS[0]: 11, SHARDS[1]: 12, "config.json": "{}"})
    shardkit.convert(source, tmp_path / "out", checksum="sha256", max_shard=180)
    clean = shardkit.verify(tmp_path / "out")
    assert (clean.unchecked, clean.left_out) == (0, ())
    assert not any("not checked" in note for note in clean.notes)
    build(tmp_path / "out", {"extra.txt": "x", "other.safetensors": 5})
    found = shardkit.verify(tmp_path / "out")
    assert found.notes[-1] == "files beside the weights were not checked: 'extra.txt'"
    assert [Path(part.path).name for part in found.left_out] == ["other.safetensors"]


def link_in_circles(folder: Path) -> None:
    (folder / "self").symlink_to(".")
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")


def put_a_pipe_and_a_device(folder: Path) -> None:
    os.mkfifo(folder / "x.bin")
    (folder / "null.bin").symlink_to(os.devnull)


def nest_folders(folder: Path) -> None:
    (folder / "/".join("d" * 200)).mkdir(parents=True)


def begin_a_zip_archive(folder: Path) -> None:
    (folder / "x.zip").write_bytes(b"PK\3\4" + b"\xff" * 99)


def choose_a_name_that_a_terminal_obeys(folder: Path) -> None:
    save_file({"a": torch.ones(1)}, folder / "\x1b[31m\n.safetensors")


HOSTILE = [
    link_in_circles,
    put_a_pipe_and_a_device,
    nest_folders,
    begin_a_zip_archive,
    choose_a_name_that_a_terminal_obeys,
]


@pytest.mark.timeout(60)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("spoil", HOSTILE)
def test_a_hostile_folder_is_walked_in_bounded_time(
    spoil: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from shardkit.cli import main

    build(tmp_path, {"model.safetensors": 1})
    spoil(tmp_path)
    assert list(shardkit.open(tmp_path)) == ["1.weight"]
    assert main(["inspect", str(tmp_path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.timeout(120)
def test_of_very_many_files_the_largest_are_opened_and_the_rest_is_counted(tmp_path: Path) -> None:
    build(tmp_path, {"model.safetensors": 1, "projector.safetensors": 2})
    for number in range(3000):
        (tmp_path / f"{number}.bin").write_bytes(b"x")
    checkpoint = shardkit.open(tmp_path)
    assert [part.path for part in checkpoint.left_out] == ["*.bin", "projector.safetensors"]
    (note,) = checkpoint.notes
    assert "2,001 of them were judged by name alone" in note


def test_a_link_to_missing_weights_is_noted(tmp_path: Path) -> None:
    build(tmp_path, {"model.safetensors": 1})
    (tmp_path / "adapter_model.safetensors").symlink_to("../blobs/gone")
    (tmp_path / "gone.txt").symlink_to("../blobs/gone")
    assert shardkit.open(tmp_path).notes == (
        "links to files that are missing: 'adapter_model.safetensors'",
    )


def test_what_cannot_be_read_is_reported_and_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build(tmp_path / "model", {"model.safetensors": 1, "key.txt": "x", "vocab.txt": "y"})
    readable = vars(Source)["file"].__func__

    def file(cls: type[Source], path: Path, *args: object) -> Source:
        if path.name == "key.txt":
            raise FormatError(path, "cannot be read: Permission denied")
        found: Source = readable(cls, path, *args)
        return found

    monkeypatch.setattr(Source, "file", classmethod(file))
    (part,) = shardkit.convert(source, tmp_path / "out").left_out
    assert (part.path, part.reason) == ("key.txt", "cannot be read, so it is not copied")
    assert sorted(os.listdir(tmp_path / "out")) == ["model.safetensors", "vocab.txt"]


def test_what_is_too_large_to_be_copied_is_reported(tmp_path: Path) -> None:
    source = build(tmp_path / "model", {"model.safetensors": 1, "vocab.txt": "x"})
    os.truncate(source / "vocab.txt", 50_000_001)
    (part,) = shardkit.convert(source, tmp_path / "out").left_out
    assert (part.path, part.nbytes) == ("vocab.txt", 50_000_001)
    assert "not copied" in part.reason
    assert not (tmp_path / "out" / "vocab.txt").exists()
