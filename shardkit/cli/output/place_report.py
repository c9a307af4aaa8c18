"""Report the device of each block of a checkpoint, as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from shardkit.checkpoint.blocks import runs_of_names
from shardkit.checkpoint.device_fit import CPU, DISK, Fit
from shardkit.cli.output.printing import Role, aligned, named, painted, parts_left_out, remarked
from shardkit.errors import LoadError, PlanError
from shardkit.operations.place import Placed
from shardkit.printable import printable, several
from shardkit.sizes import format_size

if TYPE_CHECKING:
    from shardkit.load.performance.forecast import Forecast

_MOST = 10
_SIZES = frozenset({2, 3})
_IDLE = {
    "disk": "nothing is read from disk",
    "copy": "nothing is copied in memory",
    "link": "nothing is sent to an accelerator",
    "compute": "no matrix is multiplied",
}


def foreseen(found: Placed, rates: Mapping[str, int], tokens: int | None) -> Forecast:
    """What a forward takes.

    Args:
        found: where the blocks lie.
        rates: those that are known, by their names.
        tokens: how many go in at once, to measure the other rates with; None to measure nothing.

    Raises:
        LoadError: torch is not installed.
        PlanError: a forward depends on none of *rates*, and nothing is to be measured.
        FormatError: a file cannot be read.
    """
    try:
        from shardkit.load.performance.bandwidth import Rates
        from shardkit.load.performance.forecast import forecast, rates_here
    except ModuleNotFoundError:
        raise LoadError(
            "a prediction needs torch, which is not installed", hint="pip install torch"
        ) from None
    homes = found.fit.homes
    measured = Rates() if tokens is None else rates_here(found.blocks, homes, tokens, found.runner)
    known = measured.given(**{name: float(rate) for name, rate in rates.items()})
    expected = forecast(
        found.blocks, homes, max(0, found.fit.left[found.runner]), known, found.runner
    )
    if tokens is None and set(rates) <= set(expected.idle):
        raise PlanError(
            f"the rates given ({', '.join(rates)}) have no effect: {_why_idle(expected.idle)}",
            hint="add the compute rate, as in compute=900GB",
        )
    return expected


def _why_idle(idle: Sequence[str]) -> str:
    """Why a forward depends on none of the rates in *idle*."""
    return ", ".join(_IDLE[name] for name in idle)


def drawn(found: Placed, forecast: Forecast | None) -> Iterator[str]:
    """The lines that show *found*, and what a forward takes if that is known."""
    as_type = f" as {found.dtype}" if found.dtype else ""
    amount = f"{several(len(found.blocks), 'block')}, {format_size(found.nbytes)}{as_type}"
    yield painted(f"{named(found.source)} ({found.format}): {amount}", Role.HEADING)
    yield from aligned(_rows(found.fit), right=_SIZES)
    yield from remarked(
        [*_remarks(found), *(_expectations(forecast) if forecast else ())], indent=0
    )


def document(found: Placed, forecast: Forecast | None) -> dict[str, object]:
    """Everything that `shardkit place --json` says."""
    fitted = found.fit
    return {
        "source": found.source,
        "format": found.format,
        "dtype": found.dtype,
        "nbytes": found.nbytes,
        "blocks": [
            {
                "name": block.name,
                "device": fitted.homes[block.name],
                "nbytes": block.nbytes,
                "tensors": [entry.name for entry in block.entries],
            }
            for block in found.blocks
        ],
        "budgets": fitted.budgets,
        "used": fitted.used,
        "left": fitted.left,
        "largest": {"name": found.largest.name, "nbytes": found.largest.nbytes},
        "largest_loaded": fitted.largest_loaded,
        "lacking": fitted.lacking,
        "read_per_forward": found.read,
        "forecast": forecast.as_dict() if forecast else None,
        "aliases": found.aliases,
        "left_out": [asdict(part) for part in found.left_out],
        "notes": found.notes,
    }


def _expectations(forecast: Forecast) -> Iterator[tuple[str, str]]:
    from shardkit.load.performance.cost_model import STAGES

    predicted = forecast.predicted
    if predicted is None and forecast.least is not None:
        yield (
            "at least",
            (
                f"{forecast.least:.3g} s for a forward, to transfer the weights; the compute "
                "throughput is unknown"
            ),
        )
    if predicted is not None:
        stages = zip(STAGES, predicted.busy, strict=True)
        busy = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in stages if seconds)
        hidden = f"; {predicted.hidden:.0%} of reading hidden" if predicted.reading else ""
        yield (
            "a forward",
            (
                f"{predicted}, the first {predicted.first:.3g} s; limit: {predicted.limit}{hidden} "
                f"({busy})"
            ),
        )
    if forecast.ring:
        lacking = f"; {format_size(forecast.lacking)} more than is left" if forecast.lacking else ""
        yield "buffer", f"{format_size(forecast.ring)}, {forecast.depth}{lacking}"
    yield "rates", f"{forecast.rates}" or "none"
    known = asdict(forecast.rates)
    if idle := [name for name in forecast.idle if known[name] is not None]:
        yield "note", f"no forward depends on {', '.join(idle)}: {_why_idle(idle)}"


def _rows(fitted: Fit) -> Iterator[tuple[str, str, str, str]]:
    for device in fitted.used:
        label = device
        for run in runs_of_names(name for name, home in fitted.homes.items() if home == device):
            names = run[0] if len(run) == 1 else f"{run[0]} … {run[-1].rpartition('.')[2]}"
            nbytes = sum(fitted.sizes[name] for name in run)
            yield label, printable(names), several(len(run), "block"), format_size(nbytes)
            label = ""
        if label and device != DISK:
            yield label, "nothing", "", ""


def _remarks(found: Placed) -> Iterator[tuple[str, str]]:
    fitted = found.fit
    for device, left in fitted.left.items():
        yield f"left on {device}", f"{format_size(left)} of {format_size(fitted.budgets[device])}"
    if fitted.used[DISK]:
        yield "on disk", f"{format_size(fitted.used[DISK])}, read in every forward"
    if found.read[CPU]:
        yield (
            "on cpu",
            f"{format_size(found.read[CPU])}, copied to {found.runner} in every forward",
        )
    yield "largest", f"{printable(found.largest.name)}, {format_size(found.largest.nbytes)}"
    for device, block in fitted.largest_loaded.items():
        if device not in fitted.lacking:
            yield "reserved", _reserved(fitted, device, block)
    for device, nbytes in fitted.lacking.items():
        block = fitted.largest_loaded[device]
        what = f"{printable(block)} ({format_size(fitted.sizes[block])})"
        needs = f"{what} must be loaded onto {device}, which is {format_size(nbytes)} short"
        yield "does not fit", needs
    for alias, kept in list(found.aliases.items())[:_MOST]:
        yield "tied", f"{printable(alias)} = {printable(kept)}"
    if len(found.aliases) > _MOST:
        yield "tied", f"{len(found.aliases) - _MOST:,} more"
    yield from parts_left_out(found.left_out)
    yield from (("note", printable(note)) for note in found.notes)


def _reserved(fitted: Fit, device: str, block: str) -> str:
    """What *device* keeps free to load *block*, the largest of those that it loads."""
    below = (DISK,) if device == CPU else (CPU, DISK)
    sources = " and ".join(each for each in below if fitted.used.get(each))
    room = format_size(fitted.sizes[block])
    largest = f"{printable(block)} is the largest"
    return f"{room} of what is left on {device}, for blocks from {sources}; {largest}"
