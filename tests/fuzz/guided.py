"""One parser under atheris, which changes bytes at random and keeps what leads to code that was not
reached before.

    python tests/fuzz/guided.py PARSER FOLDER [options of libFuzzer]

In FOLDER is kept what leads far, so that the next run goes on from there, and the input of a
finding.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path
from random import Random

import atheris

from mutations import changed

with atheris.instrument_imports(include=["shardkit", "shardkit_npz"]):
    from parsers import PARSERS, check
    from shardkit.sources import registry

    registry.formats(), registry.codecs()  # imported here, that they are instrumented too

SECONDS = 10  # for one input
MEGABYTES = 1024  # in use
ADDRESSES = 4 << 30  # bytes that may be asked for, used or not
LONGEST = 16 << 10
AS_JSON = 0.7  # of the changes


def mutated(content: bytes, longest: int, seed: int) -> bytes:
    """JSON, more often than not changed as JSON."""
    random = Random(seed)
    new = changed(content, random) if random.random() < AS_JSON else None
    return new if new is not None and len(new) <= longest else atheris.Mutate(content, longest)


def main(name: str, folder: Path, *options: str) -> None:
    """Run until libFuzzer's *options* say that it is enough, or until a finding."""
    parser = PARSERS[name]
    kept, seeds = folder / "kept", folder / "seeds"
    for each in (kept, seeds):
        each.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(parser.seeds()):
        (seeds / f"{number}").write_bytes(seed)
    bounds = (
        f"-timeout={SECONDS}",
        f"-rss_limit_mb={MEGABYTES}",
        f"-max_len={LONGEST}",
        f"-artifact_prefix={folder}/",
    )
    more = {"custom_mutator": mutated} if parser.is_json else {}
    with tempfile.TemporaryDirectory(dir=_memory()) as room:
        arguments = [sys.argv[0], str(kept), str(seeds), *bounds, *options]
        atheris.Setup(arguments, lambda content: check(parser, content, Path(room)), **more)
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
        atheris.Fuzz()


def _memory() -> Path | None:
    """A folder in memory: every input is written to a file."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else None


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
