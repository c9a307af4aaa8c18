"""The former place of `Rates`, which `shardkit.load` exports now; goes in version 0.3."""

from __future__ import annotations

import warnings


def __getattr__(name: str) -> object:
    if name != "Rates":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        "shardkit.load.rates will be removed in version 0.3: import Rates from shardkit.load",
        DeprecationWarning,
        stacklevel=2,
    )
    from shardkit.load.performance.bandwidth import Rates

    return Rates
