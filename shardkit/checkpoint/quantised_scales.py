"""Which tensors are the scales, zero points and tables of quantised weights. They must keep their
type when weights are cast.

Told by layout: a module (or a parameter) that holds codes holds nothing else but what decodes them,
and perhaps a bias.

| format | codes | beside them |
|---|---|---|
| bitsandbytes 4 | `weight` (U8) | `weight.absmax`, `weight.quant_map`, `weight.nested_absmax`, … |
| bitsandbytes 8-bit | `weight` (I8) | `SCB`, `weight_format` |
| GPTQ, AWQ | `qweight` (I32) | `scales`, `qzeros`, `g_idx` |
| compressed-tensors | `weight_packed` (I32), `weight` (I8, F8) | `weight_scale`, `weight_zero_point`, `input_scale`, … |
| FP8 of DeepSeek and Transformers | `weight` (F8) | `weight_scale_inv`, `weight_scale`, `input_scale` |
| MXFP4 of gpt-oss | `…_blocks` (U8) | `…_scales`, `…_bias` |
| ModelOpt NVFP4 | `weight` (U8) | `weight_scale`, `weight_scale_2`, `input_scale` |
| MLX | `weight` (U32) | `scales`, `biases` |
| Quanto | `weight._data` (I8) | `weight._scale`, `input_scale`, `output_scale` |
| AQLM | `codes` (I8, I16) | `codebooks`, `scales` |
| torchao | `_weight_qdata` (I8, U8, I32, F8) | `_weight_scale`, `_weight_zero_point`, `_weight_scale_and_zero` |
| HQQ | `W_q` (U8, I32) | `scale`, `zero` |
"""

from __future__ import annotations

from collections.abc import Iterable

from shardkit.checkpoint.entries import TensorEntry

_PACKED = frozenset({"I8", "U8", "I16", "U16", "I32", "U32"})
_CODES = frozenset({"weight", "qweight", "W_q", "_data", "codes", "indices"})
_QDATA = "_qdata"
_CODES_END = ("_blocks", "_packed", "_codes", "_quantized", _QDATA)
_ORDINARY_END = ("weight", "bias")
_OF_CODES = frozenset({"SCB", "scales", "biases", "codebooks"})
_OF_CACHES = frozenset(
    {"k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale", "input_scale", "output_scale"}
)


def is_codes(entry: TensorEntry) -> bool:
    """Whether *entry* holds the codes of a quantised weight, and no numbers that mean something by
    themselves.
    """
    if entry.dtype.kind == "float":
        return entry.dtype.bits < 16
    last = _split(entry.name)[1]
    named = last in _CODES or last.endswith(_CODES_END)
    return named and entry.dtype.code in _PACKED and len(entry.shape) > 1


def decoding(entries: Iterable[TensorEntry]) -> frozenset[str]:
    """The names of the floats of 16 bits and more without which codes among *entries* mean
    nothing.
    """
    entries = tuple(entries)
    codes = [entry.name for entry in entries if is_codes(entry)]
    if not codes:
        return frozenset()
    modules = {_split(name)[0] for name in codes} - {""}
    parameters = frozenset(codes)
    return frozenset(entry.name for entry in entries if _is_beside(entry, modules, parameters))


def _is_beside(entry: TensorEntry, modules: set[str], parameters: frozenset[str]) -> bool:
    if entry.dtype.kind != "float" or entry.dtype.bits < 16:
        return False
    module, last = _split(entry.name)
    if module in parameters or last in _OF_CACHES:
        return True
    if last.endswith(_ORDINARY_END):
        return False
    if module:
        return module in modules
    # At the top of a file there is no module, and so only what is called after the codes, or as it
    # is beside codes alone.
    top = [name for name in parameters if "." not in name]
    return bool(top) and (
        last in _OF_CODES or any(last.startswith(f"{name.removesuffix(_QDATA)}_") for name in top)
    )


def _split(name: str) -> tuple[str, str]:
    module, _, last = name.rpartition(".")
    return module, last
