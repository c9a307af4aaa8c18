"""What goes wrong with the Hub, as a `LoadError` that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from shardkit.errors import LoadError
from shardkit.printable import shown

_LOGIN = "run `hf auth login`, set HF_TOKEN, or pass token="
_MIRROR = "check HF_ENDPOINT: a mirror must answer as the Hub does; behind a proxy, log in there"


class Unreachable(LoadError):
    """The Hub cannot be asked just now, or does not let us in: what is in the cache may do."""


@contextmanager
def explained(name: str, revision: str, *, has_token: bool) -> Iterator[None]:
    """Raise what goes wrong while the Hub is asked for a model as a LoadError.

    Args:
        name: of the repository.
        revision: branch, tag or commit.
        has_token: whether the requests carry a token.

    Raises:
        Unreachable: the Hub cannot be asked, or does not let us in.
        LoadError: it answers that there is no such thing, or not as the Hub does.
    """
    try:
        yield
    except LoadError:
        raise
    except Exception as error:
        found = _translated(error, name, revision, has_token)
        if found is None:
            raise
        raise found from None


def transport_error() -> type[Exception]:
    """What the HTTP client of huggingface_hub raises: it is httpx or httpx2, as the version has
    it.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1]


def _translated(error: Exception, name: str, revision: str, has_token: bool) -> LoadError | None:
    """*error* as the first line that fits has it; None for what nobody expects."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # why it was not asked for on the Hub
    hub, what, why = constants.ENDPOINT, shown(name), _first_line(error)
    terms = f"accept them at {hub}/{name}"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    lines: tuple[tuple[type[Exception], type[LoadError], str, str], ...] = (
        (
            errors.GatedRepoError,
            Unreachable,
            f"{what} is gated: its authors let in those who accept their terms",
            f"{terms}, with the account of the token" if has_token else f"{terms}; then {_LOGIN}",
        ),
        (
            errors.DisabledRepoError,
            LoadError,
            f"{what} was disabled at {hub}",
            "choose another model",
        ),
        (
            errors.RevisionNotFoundError,
            LoadError,
            f"{what} has no branch, tag or commit {shown(revision)}",
            f"look at {hub}/{name} for those that there are",
        ),
        (
            errors.RepositoryNotFoundError,
            Unreachable,
            f"there is no model {what} at {hub}, or it is private",
            "check the name, and whether the account of the token may read it"
            if has_token
            else f"check the name; if it is private, {_LOGIN}",
        ),
        (
            errors.EntryNotFoundError,
            LoadError,
            f"{what} has not the file that was asked for: {why}",
            "call again: the repository may have changed just now",
        ),
        (
            errors.OfflineModeIsEnabled,
            Unreachable,
            f"the Hub may not be asked for {what}: HF_HUB_OFFLINE is set",
            "download the model where there is a network, or take HF_HUB_OFFLINE away",
        ),
        (
            errors.FileMetadataError,
            LoadError,
            f"{hub} does not tell what it must about the files of {what}: {why}",
            _MIRROR,
        ),
        (
            errors.LocalTokenNotFoundError,
            LoadError,
            "token=True, and no token is stored on this machine",
            _LOGIN,
        ),
        (
            errors.HFValidationError,
            LoadError,
            f"{what} is no name of a model: {why}",
            "a name is as in bigscience/T0pp",
        ),
        (
            errors.HfHubHTTPError,
            Unreachable,
            f"{hub} refused a request for {what}: {why}",
            _for_status(status),
        ),
        (
            transport_error(),
            Unreachable,
            f"{hub} cannot be reached for {what}: {type(error).__name__}: {why}",
            "check the network and HF_ENDPOINT, and call again",
        ),
        (
            OSError,
            LoadError,
            f"{what} cannot be written to the cache: {why}",
            "free some space or mend the folder; HF_HOME or cache_dir= choose another",
        ),
        *(
            (
                kind,
                LoadError,
                f"{hub} does not answer as the Hub does: {type(error).__name__}: {why}",
                _MIRROR,
            )
            for kind in (ValueError, KeyError, TypeError, AttributeError)
        ),
    )
    fitting = (
        made(message, hint=hint) for kind, made, message, hint in lines if isinstance(error, kind)
    )
    return next(fitting, None)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shown(lines[0]) if lines else type(error).__name__


def _for_status(status: int) -> str:
    if status in (401, 403):
        return f"check that the token is valid and may read this model; {_LOGIN}"
    if status == 429:
        return "wait some minutes, and call again; with a token the Hub allows more requests"
    return "call again in a while"
