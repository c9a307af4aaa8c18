"""The sources that checks need, and failure messages that name the check."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardkit.errors import FormatError
from shardkit.limits import Limits
from shardkit.payloads.payload import Extent, read_all
from shardkit.sources.format import Format, Source
from shardkit.testing.payloads import Watched, expect


class Exact(Source):
    """A source that reads exactly what is requested, so that reads can be observed."""

    def read(self, start: int, nbytes: int) -> bytes:
        if start < 0 or nbytes < 0 or start + nbytes > self.size:
            return super().read(start, nbytes)  # says so
        return bytes(read_all(self.content.narrow(start, nbytes)))


def source_of(path: Path) -> Source:
    """Return the source of *path*, as shardkit passes it to a format."""
    return Source.folder(path, Limits()) if path.is_dir() else Source.file(path, Limits())


def watched(path: Path) -> Watched:
    """Return the content of the file *path*, which records what is read of it."""
    return Watched(path, Extent(path, 0, path.stat().st_size))


def claims(candidate: Format, source: Source, name: str) -> bool:
    """Return the result of sniff; the only error that it may raise is the one for a broken zip
    archive.
    """
    try:
        verdict = candidate.sniff(source)
    except FormatError:
        expect(
            source.head[:2] == b"PK",
            f"sniff raised a FormatError for {name}, and must return False",
        )
        return False
    except Exception as error:
        raise AssertionError(
            f"sniff raised {type(error).__name__} for {name}, and must return True or False: "
            f"{error}"
        ) from error
    expect(
        type(verdict) is bool, f"sniff must return True or False, found a {type(verdict).__name__}"
    )
    return verdict


@contextmanager
def saying(where: str) -> Iterator[None]:
    """Prefix every failure inside with *where*; any other exception becomes a failure too."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{where}: {error}") from error
    except Exception as error:
        raise AssertionError(f"{where}: {type(error).__name__} came out: {error}") from error
