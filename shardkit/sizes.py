"""Sizes as people write them: "2GB" is 2·10⁹ bytes, "2GiB" is 2·2³⁰, "2G" is "2GB", a bare number
is bytes.

Case never means bits: "2gb", "2Gb" and "2GB" are one size (IEC 80000-13 prefixes, as dd and docker
read them).
"""

from __future__ import annotations

import re

from shardkit.errors import BadSize
from shardkit.printable import shown

_PREFIXES = "kmgtp"
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(?:([kmgtp])(i?))?b?\s*", re.IGNORECASE | re.ASCII)
_HINT = 'write a number of bytes, or one with a unit, as in "2GB", "500MiB" or "1.5G"'


def parse_size(size: str | int, *, least: int = 1) -> int:
    """The number of bytes that *size* says.

    Raises:
        BadSize: it is no size, or less than *least* bytes.
    """
    if isinstance(size, str):
        size = _parse(size)
    if size < least:
        bound = "one byte" if least == 1 else f"{least} bytes"
        raise BadSize(f"a size must be at least {bound}, found {shown(size)}", hint=_HINT)
    return size


def format_size(nbytes: int) -> str:
    """*nbytes* in decimal units with three digits, as in "4.37 GB"; exact below one kilobyte."""
    if nbytes < 1000:
        return f"{nbytes} B"
    scaled = float(nbytes)
    for prefix in ("k", "M", "G", "T", "P"):
        scaled /= 1000
        if scaled < 999.5 or prefix == "P":
            break
    return f"{scaled:.{max(0, 3 - len(str(int(scaled))))}f} {prefix}B"


def _parse(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise BadSize(f"{shown(text)} is not a size", hint=_HINT)
    number, prefix, binary = match.groups()
    power = _PREFIXES.index(prefix.lower()) + 1 if prefix else 0
    unit = (1024 if binary else 1000) ** power
    return int(number) * unit if number.isdigit() else int(float(number) * unit)
