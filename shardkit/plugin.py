"""Everything that the author of a format or a codec imports; the built-in ones import it too."""

from __future__ import annotations

from shardkit.checkpoint.entries import Checkpoint, Other, OtherKind, SourceFile, TensorEntry
from shardkit.dtypes import BY_CODE, BY_TORCH, DTYPES, DType
from shardkit.errors import (
    FormatError,
    LimitExceeded,
    Malformed,
    NameClash,
    PluginError,
    ShardkitError,
    UnknownFormat,
    Unwritable,
)
from shardkit.hints import Hint, Option, option, renaming
from shardkit.limits import Limits
from shardkit.metadata.shard_index import fault_of_name
from shardkit.metadata.strict_json import parse_json
from shardkit.payloads.coalesce import coalesced
from shardkit.payloads.codec import Codec, Frame
from shardkit.payloads.compressed import Expanded, Framed
from shardkit.payloads.payload import (
    CHUNK,
    PAGE,
    Concat,
    Extent,
    Literal,
    Part,
    Payload,
    Swapped,
    Trailer,
    read_all,
    rechunked,
)
from shardkit.payloads.strided import strided
from shardkit.printable import several, shown
from shardkit.sources.format import Format, Source
from shardkit.sources.zip_directory import STORED, Member

__all__ = [
    "BY_CODE",
    "BY_TORCH",
    "CHUNK",
    "DTYPES",
    "PAGE",
    "STORED",
    "Checkpoint",
    "Codec",
    "Concat",
    "DType",
    "Expanded",
    "Extent",
    "Format",
    "FormatError",
    "Frame",
    "Framed",
    "Hint",
    "LimitExceeded",
    "Limits",
    "Literal",
    "Malformed",
    "Member",
    "NameClash",
    "Option",
    "Other",
    "OtherKind",
    "Part",
    "Payload",
    "PluginError",
    "ShardkitError",
    "Source",
    "SourceFile",
    "Swapped",
    "TensorEntry",
    "Trailer",
    "UnknownFormat",
    "Unwritable",
    "coalesced",
    "fault_of_name",
    "option",
    "parse_json",
    "read_all",
    "rechunked",
    "renaming",
    "several",
    "shown",
    "strided",
]
