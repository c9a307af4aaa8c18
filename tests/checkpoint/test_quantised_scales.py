"""--dtype leaves the scales, zero points and tables of quantised weights as they are, in every
layout that is in use.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import shardkit
from shardkit.checkpoint.edits import cast_to
from shardkit.checkpoint.entries import TensorEntry
from shardkit.dtypes import BY_CODE
from shardkit.payloads.payload import Literal

# Tensors as "name: code of its type, shape"; what is cast, when floats are cast to BF16, ends in a
# star.
LAYOUTS = {
    "bitsandbytes nf4": """
        l.weight U8 32,1 | l.weight.absmax U8 4 | l.weight.quant_map F32 16 | l.weight.nested_absmax F32 1
        l.weight.nested_quant_map F32 256 | l.weight.quant_state.bitsandbytes__nf4 U8 90 | l.bias F16 4* | norm.weight F16 4*
    """,
    "bitsandbytes fp4, not nested": (
        "l.weight U8 32,1 | l.weight.absmax F32 4 | l.weight.quant_map F32 16 | l.bias F32 4*"
    ),
    "bitsandbytes int8": (
        "l.weight I8 4,4 | l.SCB F32 4 | l.weight_format U8 | l.bias F16 4* | embed.weight F16 4,4*"
    ),
    "GPTQ": (
        "l.qweight I32 4,4 | l.qzeros I32 1,4 | l.scales F16 1,4 | l.g_idx I32 32 | l.bias "
        "F16 4* | norm.weight F16 4*"
    ),
    "AWQ": "l.qweight I32 4,4 | l.qzeros I32 1,4 | l.scales F16 1,4 | norm.weight F16 4*",
    "compressed-tensors int4": """
        l.weight_packed I32 4,4 | l.weight_scale F16 4,1 | l.weight_zero_point I32 4,1 | l.weight_shape I64 2 | l.bias F16 4*
    """,
    "compressed-tensors nvfp4": """
        l.weight_packed U8 4,4 | l.weight_scale F8_E4M3 4,1 | l.weight_global_scale F32 1 | l.input_global_scale F32 1
    """,
    "compressed-tensors int8 with a cache": """
        l.weight I8 4,4 | l.weight_scale F16 4,1 | l.input_scale F16 1 | attn.k_scale F16 1 | attn.v_scale F16 1
        attn.q_norm.weight F16 4*
    """,
    "FP8 in blocks": (
        "l.weight F8_E4M3 4,4 | l.weight_scale_inv F32 1,1 | l.bias F32 4* | "
        "n.weight F32 4* | g.e_bias F32 4*"
    ),
    "FP8 of experts": (
        "m.experts.up_proj F8_E4M3 2,4,4 | m.experts.up_proj_scale_inv F32 2,1 | "
        "m.experts.up_proj_bias F32 2,4*"
    ),
    "FP8 alone": "weight F8_E4M3 4,4 | weight_scale F32 1 | bias F32 4* | scale F32 4*",
    "GPTQ alone": "qweight I32 4,4 | qzeros I32 1,4 | scales F16 1,4 | g_idx I32 32 | bias F16 4*",
    "MXFP4": """
        m.up_proj_blocks U8 2,4,1,16 | m.up_proj_scales U8 2,4,1 | m.up_proj_bias F32 2,4* | r.weight F32 2,4* | sinks F32 8*
    """,
    "ModelOpt NVFP4": (
        "l.weight U8 4,4 | l.weight_scale F8_E4M3 4,1 | l.weight_scale_2 F32 | "
        "l.input_scale F32 | n.weight F32 4*"
    ),
    "MLX": (
        "l.weight U32 4,4 | l.scales F16 4,1 | l.biases F16 4,1 | l.bias F16 4* | norm.weight "
        "F16 4*"
    ),
    "Quanto": (
        "l.weight._data I8 4,4 | l.weight._scale F16 4,1 | l.input_scale F16 | "
        "l.output_scale F16 | l.bias F16 4*"
    ),
    "AQLM": (
        "l.codes I16 4,4,1 | l.codebooks F16 1,256,1,8 | l.scales F16 4,1,1,1 | norm.weight F16 4*"
    ),
    "HQQ": "l.W_q U8 4,4 | l.scale F16 4,1 | l.zero F16 4,1 | l.bias F16 4*",
    "torchao int8": """
        l._weight_qdata I8 4,4 | l._weight_scale BF16 4,1 | l._weight_zero_point F32 4,1 | l.bias F32 4* | norm.weight F32 4*
    """,
    "torchao int4": (
        "l._weight_qdata I32 4,4 | l._weight_scale_and_zero F32 1,4,2 | l.bias F32 "
        "4* | embed.weight F32 4,4*"
    ),
    "torchao uint4": (
        "l._weight_qdata U8 4,4 | l._weight_scale F16 1,4 | l._weight_zero_point "
        "F16 1,4 | norm.weight F32 4*"
    ),
    "torchao float8": "l._weight_qdata F8_E4M3 4,4 | l._weight_scale F32 4,1 | l.bias F16 4*",
    "torchao alone": (
        "_weight_qdata I8 4,4 | _weight_scale F32 4,1 | _weight_zero_point F32 4,1 "
        "| bias F32 4* | scale F32 4*"
    ),
    "nothing quantised": (
        "l.weight F32 4,4* | l.bias F32 4* | norm.scale F32 4* | logit_scale "
        "F32* | ids I64 1,8 | count I64"
    ),
    "integers that are no codes": (
        "attn.bias U8 1,1,4,4 | attn.masked_bias F32* | attn.scale F32 4* | types.weight F32 2,4*"
    ),
}


def tensors(layout: str) -> list[tuple[TensorEntry, bool]]:
    made = []
    for line in layout.strip().replace("\n", "|").split("|"):
        name, code, *shape = line.strip().removesuffix("*").split(" ")
        lengths = tuple(map(int, shape[0].split(","))) if shape else ()
        dtype = BY_CODE[code]
        entry = TensorEntry((name,), dtype, lengths, Literal(bytes(dtype.nbytes(lengths))))
        made.append((entry, line.strip().endswith("*")))
    return made


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_decodes_codes_keeps_its_type(layout: str) -> None:
    expected = tensors(layout)
    cast, notes = cast_to([entry for entry, _ in expected], BY_CODE["BF16"])
    assert {entry.name: entry.dtype.code for entry in cast} == {
        entry.name: "BF16" if is_cast else entry.dtype.code for entry, is_cast in expected
    }
    wide = [
        e
        for e, is_cast in expected
        if not is_cast and e.dtype.kind == "float" and e.dtype.bits >= 16
    ]
    many = "not cast: 1 tensor of " if len(wide) == 1 else f"not cast: {len(wide)} tensors of "
    said = [
        note for note in notes if note.startswith(many) and "scales, zero points or tables" in note
    ]
    assert len(said) == bool(wide)


def test_a_conversion_says_what_it_left_as_it_is_and_the_bytes_are_the_same(tmp_path: Path) -> None:
    state = {
        "l.qweight": torch.ones(4, 4, dtype=torch.int32),
        "l.scales": torch.full((1, 4), 1.0001, dtype=torch.float32),
        "n.weight": torch.ones(4),
    }
    save_file(state, tmp_path / "model.safetensors")
    report = shardkit.convert(tmp_path / "model.safetensors", tmp_path / "out", dtype="bf16")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["l.scales"], state["l.scales"])
    assert written["n.weight"].dtype is torch.bfloat16
    assert report.notes == (
        "not cast: 1 tensor of scales, zero points or tables of quantised weights: 'l.scales'",
    )
    assert report.cast == 1


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "odd"}}, "'odd'"),
        ({"text_config": {"quantization_config": {}}}, "'unnamed'"),
    ],
)
def test_a_config_that_says_quantised_where_nothing_looks_so_is_reported(
    config: dict[str, object], method: str, tmp_path: Path
) -> None:
    save_file({"w": torch.ones(4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    plain = shardkit.convert(tmp_path, tmp_path / "plain")
    cast = shardkit.convert(tmp_path, tmp_path / "cast", dtype="bf16")
    assert not [note for note in plain.notes if "quantised" in note]
    (note,) = (note for note in cast.notes if "quantised" in note)
    assert f"(method {method})" in note
