"""What a run reports while it works, for programs; the progress bar is drawn from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

EventKind = Literal["planned", "resumed", "started", "written", "finished", "committed"]
"""What happened; `Event` says what each means."""


@dataclass(frozen=True, slots=True)
class Event:
    """One step of a run, as `convert` and `offload_prep` report it to *on_event*.

    Attributes:
        kind: what happened. ``"planned"``: it is decided what is written. ``"resumed"``: a file was
            complete already. ``"started"``: the first byte of a file comes next. ``"written"``:
            more bytes of a file. ``"finished"``: a file is complete, synced and on record.
            ``"committed"``: the output is in its place.
        file: name of the file, relative to the output; of the output itself where the event is
            about all of it.
        nbytes: with ``"written"`` the bytes since the last such event of this file; otherwise the
            size of the file, or of the output, in bytes, before compression.

    Example:
        >>> import shardkit
        >>> events = []
        >>> report = shardkit.convert("model.safetensors", "out", on_event=events.append)
        >>> [event.kind for event in events if event.kind != "written"]
        ['planned', 'started', 'finished', 'committed']
        >>> sum(event.nbytes for event in events if event.kind == "written") == events[0].nbytes
        True
    """

    kind: EventKind
    file: str
    nbytes: int


OnEvent = Callable[[Event], object]
"""Called, from any thread, with each step of a run."""
