"""What goes wrong with the Hub, as a `LoadError` that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shardkit.errors import LoadError
from shardkit.printable import shown

_LOGIN = "run `hf auth login`, set HF_TOKEN, or pass token="
_MIRROR = "check HF_ENDPOINT: a mirror must answer as the Hub does; behind a proxy, log in there"


class Unreachable(LoadError):
    """The Hub cannot be asked just now, or does not let us in: what is in the cache may do."""


@contextmanager
def explained(name: str, revision: str, *, token: str) -> Iterator[None]:
    """Raise what goes wrong while the Hub is asked for a model as a LoadError.

    Args:
        name: of the repository.
        revision: branch, tag or commit.
        token: what the requests carry, which no message repeats; "" for none.

    Raises:
        Unreachable: the Hub cannot be asked, or does not let us in.
        LoadError: it answers that there is no such thing, or not as the Hub does.
    """
    try:
        yield
    except LoadError:
        raise
    except Exception as error:  # of many libraries; what is not known is raised again
        found = _translated(error, name, revision, token)
        if found is None:
            raise
        raise found from None


def transport_error() -> type[Exception]:
    """What the HTTP client of huggingface_hub raises: it is httpx or httpx2, as the version has
    it.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1]


def _translated(error: Exception, name: str, revision: str, token: str) -> LoadError | None:
    """*error* as the first line that fits has it; None for what nobody expects."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # why it was not asked for on the Hub
    kinds = [
        *(getattr(errors, line.kind) for line in _LINES[:-3]),
        transport_error(),
        OSError,
        (ValueError, LookupError, TypeError, AttributeError),
    ]
    line = next(
        (line for line, kind in zip(_LINES, kinds, strict=True) if isinstance(error, kind)), None
    )
    if line is None:
        return None
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    words = {
        "hub": constants.ENDPOINT,
        "name": name,
        "what": shown(name),
        "revision": shown(revision),
        "kind": type(error).__name__,
        "why": _first_line(error, token),
        "access": "the account of the token must have access" if token else _LOGIN,
        "then": _for_status(status),
    }
    made = Unreachable if line.is_passing else LoadError
    return made(line.said.format_map(words), hint=line.hint.format_map(words))


@dataclass(frozen=True, slots=True)
class _Line:
    """What is said of one kind of error.

    Attributes:
        kind: its name in huggingface_hub.errors.
        said: the sentence.
        hint: what to try.
        is_passing: whether what is in the cache may do meanwhile.
    """

    kind: str
    said: str
    hint: str
    is_passing: bool = False


_LINES = (
    _Line(
        "GatedRepoError",
        "{what} is gated: its authors let in those who accept their terms",
        "accept them at {hub}/{name}; {access}",
        is_passing=True,
    ),
    _Line("DisabledRepoError", "{what} was disabled at {hub}", "choose another model"),
    _Line(
        "RevisionNotFoundError",
        "{what} has no branch, tag or commit {revision}",
        "look at {hub}/{name} for those that there are",
    ),
    _Line(
        "RepositoryNotFoundError",
        "there is no model {what} at {hub}, or it is private",
        "check the name; if it is private, {access}",
        is_passing=True,
    ),
    _Line(
        "EntryNotFoundError",
        "{what} does not have the file that was asked for: {why}",
        "call again: the repository may have changed just now",
    ),
    _Line(
        "OfflineModeIsEnabled",
        "{what} cannot be looked up on the Hub: HF_HUB_OFFLINE is set",
        "download the model where there is a network, or unset HF_HUB_OFFLINE",
        is_passing=True,
    ),
    _Line(
        "FileMetadataError",
        "{hub} does not send the headers that a download of {what} needs: {why}",
        _MIRROR,
    ),
    _Line("LocalTokenNotFoundError", "token=True, and no token is stored on this machine", _LOGIN),
    _Line(
        "HFValidationError",
        "{what} is not a valid name of a model: {why}",
        "a name is as in bigscience/T0pp",
    ),
    _Line(
        "HfHubHTTPError",
        "{hub} refused a request for {what}: {why}",
        "{then}",
        is_passing=True,
    ),
    _Line(
        "that of the HTTP client",
        "{hub} cannot be reached for {what}: {kind}: {why}",
        "check the network and HF_ENDPOINT, and call again",
        is_passing=True,
    ),
    _Line(
        "that of the system",
        "{what} cannot be written to the cache: {why}",
        "free some space or mend the folder; HF_HOME or cache_dir= choose another",
    ),
    _Line(
        "that of what was answered",
        "{hub} does not answer as the Hub does: {kind}: {why}",
        _MIRROR,
    ),
)


def _first_line(error: BaseException, token: str) -> str:
    text = str(error).replace(token, "…") if token else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return shown(lines[0]) if lines else type(error).__name__


def _for_status(status: int) -> str:
    if status in (401, 403):
        return f"check that the token is valid and may read this model; {_LOGIN}"
    if status == 429:
        return "wait some minutes, and call again; with a token the Hub allows more requests"
    return "call again in a while"
