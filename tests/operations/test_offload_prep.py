"""offload-prep: the weights of the source, laid out by blocks, in a folder that says what it is and
that everybody loads.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import shardkit
from aligned import aligned
from libraries import peer
from repository import GOOD
from shardkit.checkpoint.blocks import heads
from shardkit.checkpoint.edits import Edits
from shardkit.dtypes import BY_CODE, DTYPES
from shardkit.errors import FormatError, LimitExceeded, Malformed, PlanError, ShardkitError
from shardkit.limits import Limits
from shardkit.load.modules.weights import torch_type
from shardkit.operations.offload_prep import prepare_offload, read_order
from shardkit.payloads.payload import Extent

accelerate = peer("accelerate")
transformers = peer("transformers")

RECORD = "offload.json"
TORCH = [
    torch_dtype
    for dtype in DTYPES
    if dtype.writable and dtype.bits >= 8
    if (torch_dtype := torch_type(dtype))
]
STEPS = st.sampled_from(
    ["a", "layers.0", "layers.1", "layers.12", "mlp.experts.0", "mlp.experts.1", "w", "é"]
)
NAMES = st.lists(STEPS, min_size=1, max_size=3).map(".".join)


def llama(**options: Any) -> Any:
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
    }
    config = transformers.LlamaConfig(**{**sizes, **options})
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config)
    return model.eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama as transformers saves it, in several shards sorted by name."""
    folder = tmp_path_factory.mktemp("llama") / "llama"
    llama().save_pretrained(folder, max_shard_size="40KB")
    return folder


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / RECORD).read_text())
    return record


def blocks_of(folder: Path) -> list[str]:
    return list(dict.fromkeys(block["name"] for block in record_of(folder)["blocks"]))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_layout(folder: Path, bound: int | None) -> None:
    """What every output keeps: runs that cover the data, blocks whole, data at a page, tensors in
    step with their types.
    """
    record = record_of(folder)
    entries = {entry.name: entry for entry in shardkit.open(folder).tensors}
    ends: dict[str, int] = {}
    for block in record["blocks"]:
        path = folder / block["shard"]
        start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert start % 4096 == 0
        assert block["start"] == ends.get(block["shard"], start)
        at = block["start"]
        for name in block["tensors"]:
            payload = entries[name].payload
            assert isinstance(payload, Extent)
            assert (payload.path, payload.start) == (path, at)
            assert at % entries[name].dtype.itemsize == 0
            at += payload.nbytes
        assert at == block["stop"]
        ends[block["shard"]] = at
    for name, nbytes in ends.items():
        assert nbytes == (folder / name).stat().st_size == record["shards"][name]["nbytes"]
    for name in blocks_of(folder):
        runs = [block for block in record["blocks"] if block["name"] == name]
        whole = sum(run["stop"] - run["start"] for run in runs)
        assert len(runs) == 1 or (bound is not None and whole > bound - 20_000)


@pytest.mark.parametrize("fixture", sorted(GOOD.iterdir()), ids=lambda path: path.name)
def test_every_fixture_that_converts_is_prepared_and_is_the_same(
    fixture: Path, tmp_path: Path
) -> None:
    try:
        shardkit.convert(fixture, tmp_path / "converted", sync=False)
    except ShardkitError as error:
        with pytest.raises(type(error)):
            shardkit.offload_prep(fixture, tmp_path / "out", sync=False)
        return
    shardkit.offload_prep(fixture, tmp_path / "out", sync=False)
    assert shardkit.verify(tmp_path / "out", fixture).same
    assert shardkit.verify(tmp_path / "out").same
    check_layout(tmp_path / "out", None)


@pytest.mark.parametrize("name", ["adapter_model", "diffusion_pytorch_model", "model"])
def test_shards_are_called_as_the_library_of_the_source_looks_for_them(
    name: str, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    weights = {f"layers.{n}.weight": torch.full((900,), float(n)) for n in range(3)}
    save_file(weights, source / f"{name}.safetensors")
    shardkit.offload_prep(source, tmp_path / "one")
    assert (tmp_path / "one" / f"{name}.safetensors").is_file()
    shardkit.offload_prep(source, tmp_path / "several", max_shard="5kB")
    names = sorted(path.name for path in (tmp_path / "several").glob("*.safetensors"))
    assert names == [f"{name}-{n:05}-of-00003.safetensors" for n in (1, 2, 3)]
    assert (tmp_path / "several" / f"{name}.safetensors.index.json").is_file()
    for folder in ("one", "several"):
        assert shardkit.verify(tmp_path / folder, source).same


@st.composite
def states(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    state = {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=10, unique=True)):
        dtype, count = (
            draw(st.sampled_from(TORCH)),
            draw(st.one_of(st.integers(0, 40), st.just(3000))),
        )
        raw = torch.randint(0, 2, (count * dtype.itemsize,), dtype=torch.uint8)
        state[name] = raw.view(dtype)
    return state


@settings(max_examples=60)
@given(
    states(),
    st.one_of(st.none(), st.integers(4000, 40_000)),
    st.sampled_from([None, "layers", r"experts\.\d+$"]),
)
def test_what_is_prepared_is_what_the_source_holds(
    tmp_path_factory: pytest.TempPathFactory,
    state: dict[str, torch.Tensor],
    bound: int | None,
    blocks: str | None,
) -> None:
    folder = tmp_path_factory.mktemp("law")
    save_file(state, folder / "big.safetensors")
    if blocks and not any(re.search(blocks, head) for name in state for head in heads(name)):
        with pytest.raises(PlanError, match="matches no module name"):
            shardkit.offload_prep(folder / "big.safetensors", folder / "out", blocks=blocks)
        blocks = None
    shardkit.offload_prep(
        folder / "big.safetensors", folder / "out", blocks=blocks, max_shard=bound, sync=False
    )
    assert shardkit.verify(folder / "out", folder / "big.safetensors").same
    assert shardkit.verify(folder / "out").same
    check_layout(folder / "out", bound)


def test_blocks_stand_in_the_order_in_which_they_run_though_the_source_is_sorted(
    model: Path, tmp_path: Path
) -> None:
    report = shardkit.offload_prep(model, tmp_path / "out", max_shard="60kB")
    assert blocks_of(tmp_path / "out") == [
        "model.embed_tokens",
        *(f"model.layers.{n}" for n in range(3)),
        "model.norm",
        "lm_head",
    ]
    assert (report.blocks, report.shards) == (6, 3)
    assert all(path.stat().st_size <= 60_000 for path in (tmp_path / "out").glob("*.safetensors"))
    assert record_of(tmp_path / "out")["dtypes"] == {"F32": report.nbytes}
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("bound", ["60kB", None])
def test_transformers_and_accelerate_load_it_as_it_lies(
    model: Path, tmp_path: Path, bound: str | None
) -> None:
    out = tmp_path / "out"
    shardkit.offload_prep(model, out, max_shard=bound)
    tokens = torch.tensor([[1, 2, 3]])
    expected = llama()(tokens).logits
    assert torch.equal(
        aligned(transformers.LlamaForCausalLM.from_pretrained(out))(tokens).logits, expected
    )
    with accelerate.init_empty_weights():
        empty = transformers.LlamaForCausalLM(llama().config)
    loaded = accelerate.load_checkpoint_and_dispatch(empty, out, device_map={"": "cpu"})
    assert torch.equal(aligned(loaded)(tokens).logits, expected)


def test_the_loader_streams_from_it(model: Path, tmp_path: Path) -> None:
    from shardkit.load import close, from_pretrained

    shardkit.offload_prep(model, tmp_path / "out", dtype="bf16")
    streamed = from_pretrained(tmp_path / "out", device_map={"": "disk"}, dtype="bfloat16")
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(streamed(tokens).logits, llama().to(torch.bfloat16)(tokens).logits)
    close(streamed)


def test_the_same_source_elsewhere_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "elsewhere" / model.name)
    shardkit.offload_prep(model, tmp_path / "first", max_shard="60kB", jobs=1)
    shardkit.offload_prep(
        tmp_path / "elsewhere" / model.name, tmp_path / "second", max_shard="60kB", jobs=3
    )
    assert content(tmp_path / "first") == content(tmp_path / "second")
    assert str(tmp_path) not in (tmp_path / "first" / RECORD).read_text()


def test_what_is_prepared_from_what_was_prepared_is_the_same_but_for_its_source(
    model: Path, tmp_path: Path
) -> None:
    shardkit.offload_prep(model, tmp_path / "first", max_shard="60kB")
    shardkit.offload_prep(tmp_path / "first", tmp_path / "second", max_shard="60kB")
    first, second = content(tmp_path / "first"), content(tmp_path / "second")
    assert first.pop(RECORD) != second.pop(RECORD)
    assert first == second
    shardkit.convert(tmp_path / "first", tmp_path / "plain")
    assert not (tmp_path / "plain" / RECORD).exists()  # a record of blocks is no companion


def test_a_block_larger_than_a_shard_is_cut_and_that_is_said(tmp_path: Path) -> None:
    save_file(
        {f"layers.{n}.{part}": torch.ones(2000) for n in range(2) for part in "abc"},
        tmp_path / "m.safetensors",
    )
    report = shardkit.offload_prep(tmp_path / "m.safetensors", tmp_path / "out", max_shard="20kB")
    assert [note for note in report.notes if "split over several shards" in note] == [
        "larger than 20.0 kB with a header, so split over several shards: 'layers.0', 'layers.1'"
    ]
    assert [block["name"] for block in record_of(tmp_path / "out")["blocks"]] == [
        f"layers.{n}" for n in (0, 0, 0, 1, 1, 1)
    ]


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    shared = torch.ones(8, 4)
    torch.save(
        {"embed.weight": shared, "layers.0.w": torch.zeros(4), "head.weight": shared},
        tmp_path / "m.bin",
    )
    report = shardkit.offload_prep(tmp_path / "m.bin", tmp_path / "out")
    assert report.aliases == {"head.weight": "embed.weight"}
    assert blocks_of(tmp_path / "out") == ["embed", "layers.0"]
    assert shardkit.verify(tmp_path / "out", tmp_path / "m.bin").same


def test_the_type_is_fixed_when_it_is_written(model: Path, tmp_path: Path) -> None:
    report = shardkit.offload_prep(model, tmp_path / "out", dtype="bf16", max_shard="40kB")
    assert set(record_of(tmp_path / "out")["dtypes"]) == {"BF16"}
    assert report.cast == report.tensors
    assert shardkit.verify(tmp_path / "out", model, Edits(dtype=BY_CODE["BF16"])).same


def test_the_user_says_what_is_a_block(model: Path, tmp_path: Path) -> None:
    shardkit.offload_prep(model, tmp_path / "out", blocks=r"self_attn$|mlp$")
    assert {"model.layers.0.self_attn", "model.layers.0.mlp"} <= set(blocks_of(tmp_path / "out"))
    with pytest.raises(PlanError, match="'decoder_layer' matches no module name") as raised:
        shardkit.offload_prep(model, tmp_path / "other", blocks="decoder_layer")
    assert "'model.embed_tokens', 'model.layers.0'" in (raised.value.hint or "")
    with pytest.raises(PlanError, match=r"'\(' is not a regular expression"):
        prepare_offload(model, None, Edits(), blocks="(")


def test_an_order_that_was_recorded_is_kept(model: Path, tmp_path: Path) -> None:
    order = [
        "lm_head",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "model.embed_tokens.weight",
        "rotary",
    ]
    report = shardkit.offload_prep(model, tmp_path / "out", order=order)
    assert blocks_of(tmp_path / "out")[:3] == ["lm_head", "model.layers.1", "model.embed_tokens"]
    assert (
        "not in the order, so written last: 'model.layers.0', 'model.layers.2', 'model.norm'"
        in report.notes
    )
    assert "in the order, but not in the checkpoint: 'rotary'" in report.notes
    assert shardkit.verify(tmp_path / "out", model).same
    with pytest.raises(PlanError, match="the order names 'nobody', which is neither a block"):
        shardkit.offload_prep(model, tmp_path / "none", order=["nobody"])


def test_an_order_is_a_list_in_json_or_a_name_on_each_line(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("# recorded\nembed\n\n  layers.0 \n")
    (tmp_path / "json").write_text('\n["embed", "layers.0"]')
    assert read_order(tmp_path / "lines") == read_order(tmp_path / "json") == ("embed", "layers.0")
    for text, sentence in (
        ("[1]", "must be a list of names"),
        ("[", "begins like a JSON list but is invalid"),
    ):
        (tmp_path / "bad").write_text(text)
        with pytest.raises(PlanError, match=sentence):
            read_order(tmp_path / "bad")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(PlanError, match="is not UTF-8 text"):
        read_order(tmp_path / "bytes")
    with pytest.raises(FormatError, match="cannot be read"):
        read_order(tmp_path / "missing")


def test_one_file_is_no_place_for_blocks(model: Path) -> None:
    with pytest.raises(
        PlanError, match=r"x\.safetensors is a file, but offload-prep writes a folder"
    ):
        shardkit.offload_prep(model, "x.safetensors")
    with pytest.raises(
        PlanError, match=r"x\.safetensors\.zst is a file, but offload-prep"
    ) as caught:
        shardkit.offload_prep(model, "x.safetensors.zst", compress="zstd")
    assert "'x'" in str(caught.value.hint)


def test_a_checksum_gives_a_manifest_too(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shardkit.offload_prep(model, out, checksum="sha256", max_shard="60kB")
    assert record_of(out)["algorithm"] == "sha256"
    manifest = json.loads((out / "shardkit.manifest.json").read_text())
    assert set(manifest["files"]) == {path.name for path in out.iterdir()} - {
        "shardkit.manifest.json"
    }
    assert shardkit.verify(out).same
    damage(out / "model-00002-of-00003.safetensors", -5)
    assert [each.name for each in shardkit.verify(out).differences] == [
        record_of(out)["blocks"][2]["tensors"][-1]
    ]


def damage(path: Path, at: int) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1
    path.write_bytes(damaged)


def test_verify_names_the_block_that_differs(model: Path, tmp_path: Path) -> None:
    shardkit.offload_prep(model, tmp_path / "out")
    run = record_of(tmp_path / "out")["blocks"][2]
    damage(tmp_path / "out" / "model.safetensors", run["stop"] - 1)
    (fault,) = shardkit.verify(tmp_path / "out").differences
    assert (fault.name, fault.change) == ("model.layers.1", "bytes")
    assert (
        f"[{run['start']:,}, {run['stop']:,}) of 'model.safetensors': the xxh3 differs"
        in fault.detail
    )


def test_verify_says_what_no_block_holds(model: Path, tmp_path: Path) -> None:
    shardkit.offload_prep(model, tmp_path / "out")
    record = record_of(tmp_path / "out")
    (tmp_path / "out" / RECORD).write_text(json.dumps({**record, "blocks": record["blocks"][1:]}))
    assert (
        "not checked, because no block contains them: 1 tensor"
        in shardkit.verify(tmp_path / "out").notes
    )


def other_shards(out: Path) -> None:
    llama(hidden_size=64).save_pretrained(out, max_shard_size="100KB")


def other_types(out: Path) -> None:
    for path in out.glob("*.safetensors"):
        save_file(
            {name: tensor.view(torch.int32) for name, tensor in load_file(path).items()},
            path,
            {"format": "pt"},
        )


def cut_off(out: Path) -> None:
    path = next(out.glob("*.safetensors"))
    shard = path.read_bytes()
    path.write_bytes(shard[:8] + shard[8:].replace(b'"format":"pt"', b'"format":"np"', 1))


def other_record(out: Path) -> None:
    record = record_of(out)
    record["shards"]["model-9.safetensors"] = record["shards"].pop(min(record["shards"]))
    record["blocks"] = []
    (out / RECORD).write_text(json.dumps(record))


@pytest.mark.parametrize("change", [other_shards, other_types, cut_off, other_record])
@pytest.mark.parametrize("bound", ["60kB", None])
def test_a_record_of_other_shards_is_refused_by_name(
    model: Path, tmp_path: Path, change: Any, bound: str | None
) -> None:
    from shardkit.load import tensors

    out = tmp_path / "out"
    shardkit.offload_prep(model, out, max_shard=bound)
    if change is other_shards:
        for path in out.glob("*.safetensors*"):
            path.unlink()
    change(out)
    for read in (shardkit.open, shardkit.verify, tensors):
        with pytest.raises(
            Malformed, match=r"out/offload\.json: was made with other shards, from 'llama': "
        ) as caught:
            read(out)
        assert "remove this file" in str(caught.value.hint)
    (out / RECORD).unlink()
    assert len(shardkit.open(out)) == len(shardkit.open(model))


def test_a_record_as_long_as_a_lie_is_not_read(model: Path, tmp_path: Path) -> None:
    shardkit.offload_prep(model, tmp_path / "out")
    with (tmp_path / "out" / RECORD).open("ab") as record:
        record.write(b" " * 100_000)
    with pytest.raises(LimitExceeded, match=r"offload\.json: takes 1\d\d,\d\d\d bytes"):
        shardkit.open(tmp_path / "out", limits=Limits(header_bytes=50_000))


def test_an_earlier_output_is_replaced_by_the_other_command(model: Path, tmp_path: Path) -> None:
    shardkit.offload_prep(model, tmp_path / "out")
    shardkit.convert(model, tmp_path / "out", overwrite=True)
    assert RECORD not in os.listdir(tmp_path / "out")
    shardkit.offload_prep(model, tmp_path / "out", overwrite=True)
    assert shardkit.verify(tmp_path / "out", model).same


def test_the_plan_tells_blocks_apart_that_give_the_same_bytes(model: Path, tmp_path: Path) -> None:
    plans = [
        prepare_offload(model, tmp_path / "out", Edits(), blocks=blocks).plan
        for blocks in (None, "^model$", None)
    ]
    digests = [plan.digest for plan in plans]
    assert digests[0] == digests[2] != digests[1]


def test_runs_of_a_shard_touch(model: Path, tmp_path: Path) -> None:
    record = prepare_offload(model, tmp_path / "out", Edits()).plan.record
    assert record is not None
    assert all(
        left.stop == right.start for left, right in pairwise(record.runs_in("model.safetensors"))
    )
