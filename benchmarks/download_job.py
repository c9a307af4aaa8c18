"""One process of download.py: the server, or one that downloads and prints its seconds.

python benchmarks/download_job.py serve SOURCE HOME RATE
python benchmarks/download_job.py raw | sha256 | shardkit | huggingface_hub
"""

from __future__ import annotations

import hashlib
import http.client
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

NAME = "org/big"
FILE = "model.safetensors"
CONNECTIONS = 8
SPAN = 32 * 2**20


def serve(source: Path, home: Path, rate: int) -> None:
    """Serve *source* until it is killed; each line that comes is answered with the bytes sent."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "doubles"))
    from hub import Hub

    with Hub() as hub:
        hub.add(NAME, {FILE: source})
        hub.rate = rate or None
        for name, value in hub.environment(home).items():
            if name.startswith("HF_"):
                print(f"{name}={value}")
        print("ready", flush=True)
        for _ in sys.stdin:
            print(hub.sent, flush=True)


def raw() -> None:
    """Ranges over a few connections, into a file."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    told = get_hf_file_metadata(hf_hub_url(NAME, FILE))
    assert told.size is not None
    address, nbytes = urlsplit(told.location), told.size
    place = Path(os.environ["HF_HOME"], "hub", "raw")
    place.parent.mkdir(parents=True)
    with open(place, "wb") as file:
        file.truncate(nbytes)

    def fetch(start: int) -> None:
        end = min(start + SPAN, nbytes)
        connection = http.client.HTTPConnection(address.netloc)
        connection.request(
            "GET", f"{address.path}?{address.query}", headers={"Range": f"bytes={start}-{end - 1}"}
        )
        answer = connection.getresponse()
        buffer = memoryview(bytearray(2**20))
        with open(place, "rb+", buffering=0) as target:
            target.seek(start)
            while count := answer.readinto(buffer):
                target.write(buffer[:count])
        connection.close()

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(fetch, range(0, nbytes, SPAN)))
    with open(place, "rb+") as written:
        os.fsync(written.fileno())


def sha256() -> None:
    """The digest of the file, from the page cache."""
    with open(os.environ["SOURCE"], "rb") as file:
        hashlib.file_digest(file, "sha256")


def shardkit() -> None:
    """Through the same code as `from_pretrained`, without the model."""
    from shardkit.load.hub.download import read  # noqa: F401 - imported before the clock runs
    from shardkit.load.hub.fetch_ranges import fetch
    from shardkit.load.hub.repository import Repository

    repository = Repository.of(NAME)
    commit = repository.current_commit()
    fetch(repository, commit, list(repository.files(commit).values()), lambda nbytes: None)


def huggingface_hub() -> None:
    """As users call it."""
    from huggingface_hub import snapshot_download

    snapshot_download(NAME)


WAYS = {"raw": raw, "sha256": sha256, "shardkit": shardkit, "huggingface_hub": huggingface_hub}

if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    else:
        import huggingface_hub as client  # noqa: F401 - imported before the clock runs

        begun = time.perf_counter()
        WAYS[sys.argv[1]]()
        print(time.perf_counter() - begun)
