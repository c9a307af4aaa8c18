"""How fast a checkpoint comes into an empty model on the CPU, beside what others would run and what
the memory allows.

    python benchmarks/load.py [--folder FOLDER] [--rounds N] [--only NAME ...]

The page cache is warm, and every byte is touched once after loading, so that lazily mapped pages
flatter nobody. Contenders take turns within one run; what is printed are medians, their ratio to
the first, and the largest peak of memory. Before each, a process takes as much memory and returns
it: the host of a virtual machine is slow to give memory that was not used for a while.

fastsafetensors and Run:ai's streamer take part where they are installed (``pip install -e
".[bench]"``). ``--only small`` is the same race with huge pages disabled for everyone, and ``--only
cast`` loads the bfloat16 file into a model of float32.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from llama import LAYERS, VOCABULARY, WIDE
from measuring import Benching, Contender, in_page_cache, race, run_those_asked_for

_BESIDE = 500_000_000  # what a process with torch takes beside the weights
LOADERS = str(Path(__file__).parent / "loaders.py")
PEERS = {
    "fastsafetensors": "fastsafetensors",
    "runai": "runai-model-streamer",
}  # packages, by their jobs in loaders.py


class Bench(Benching):
    """What is run, and on what."""

    def model_folder(self) -> Path:
        """big.safetensors as transformers takes it."""
        folder = self.folder / "llama"
        folder.mkdir(exist_ok=True)
        width = {"hidden_size": WIDE.hidden, "intermediate_size": WIDE.inner}
        sizes = {
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 16,
            "vocab_size": VOCABULARY,
            **width,
        }
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes}
        (folder / "config.json").write_text(json.dumps(config))
        weights = folder / "model.safetensors"
        if not weights.is_symlink():
            weights.symlink_to(self.source("big.safetensors").resolve())
        return folder


def loader(job: str, path: Path, *, small: bool = False) -> Contender:
    """One of loaders.py; without huge pages where they are to be *small*."""
    return Contender(
        (sys.executable, LOADERS, job, str(path), *(["small"] if small else [])), tells=True
    )


def peers(path: Path, *, small: bool = False) -> dict[str, Contender]:
    """Those loaders into memory of the model's own that are installed; a line tells of the
    others.
    """
    found = {}
    for job, package in PEERS.items():
        if find_spec(package.replace("-", "_")):
            found[f"{package} {version(package)}"] = loader(job, path, small=small)
        else:
            print(f"{package} is left out: it is not installed (pip install {package})")
    return found


def safetensors(bench: Bench) -> None:
    """4.4 GB of bf16."""
    path = bench.source("big.safetensors")
    others = peers(path)
    contenders = {
        "copying into fresh memory": loader("copy", path),
        "shardkit": loader("shardkit", path),
        **others,
        "shardkit, mmap=True": loader("shardkit-mmap", path),
        "safetensors + load_state_dict(assign=True)": loader("assigned", path),
        "accelerate": loader("accelerate", path),
        "transformers": loader("transformers", bench.model_folder()),
    }
    report("big.safetensors → CPU", contenders, bench, warm=path, rivals=others)


def small_pages(bench: Bench) -> None:
    """The same with pages of 4 KiB only."""
    path = bench.source("big.safetensors")
    others = peers(path, small=True)
    contenders = {
        "copying into fresh memory": loader("copy", path, small=True),
        "shardkit": loader("shardkit", path, small=True),
        **others,
    }
    report(
        "big.safetensors → CPU, huge pages disabled", contenders, bench, warm=path, rivals=others
    )


def cast(bench: Bench) -> None:
    """The same into float32: 8.7 GB of memory."""
    path = bench.source("big.safetensors")
    contenders = {
        "accelerate": loader("accelerate-cast", path),
        "shardkit": loader("shardkit-cast", path),
    }
    report(
        "big.safetensors → CPU, cast to float32",
        contenders,
        bench,
        warm=path,
        nbytes=2 * path.stat().st_size,
    )


def torch_zip(bench: Bench) -> None:
    """The same from a pickle, beside the same from safetensors."""
    path = bench.source("big.bin")
    contenders = {
        "shardkit from big.safetensors": loader("shardkit", bench.source("big.safetensors")),
        "shardkit": loader("shardkit", path),
        "shardkit, mmap=True": loader("shardkit-mmap", path),
        "torch.load(mmap=True) + load_state_dict(assign=True)": loader("assigned", path),
        "accelerate": loader("accelerate", path),
    }
    report("big.bin → CPU", contenders, bench, warm=path)


def tiny(bench: Bench) -> None:
    """50,000 tensors of 64 bytes."""
    path = bench.source("tiny.pt")
    contenders = {"accelerate": loader("accelerate", path), "shardkit": loader("shardkit", path)}
    report("tiny.pt (50,000 tensors) → CPU", contenders, bench, warm=path)


def report(
    title: str,
    contenders: Mapping[str, Contender],
    bench: Bench,
    *,
    warm: Path,
    rivals: Iterable[str] = (),
    nbytes: int | None = None,
) -> None:
    """Race, and print a line for each contender.

    Args:
        title: what is printed first.
        contenders: all are held against the first.
        bench: how often they run.
        warm: the file that is in the page cache.
        rivals: of these the fastest is held against shardkit.
        nbytes: how much memory is touched before each; None for as much as *warm* has bytes.
    """
    taken = (nbytes or warm.stat().st_size) + _BESIDE

    def before() -> None:
        in_page_cache(warm)
        subprocess.run([sys.executable, "-c", f"b'1' * {taken}"], check=True)

    medians = race(contenders, bench.rounds, before)
    first = next(iter(medians.values())).seconds
    print(title)
    for name, each in medians.items():
        print(f"  {name:54} {each}  {each.seconds / first:5.2f} ×", flush=True)
    if best := min(rivals, key=lambda name: medians[name].seconds, default=None):
        print(
            f"  shardkit takes {medians['shardkit'].seconds / medians[best].seconds:.2f} × "
            f"{best}, the fastest peer"
        )
    print(flush=True)


BENCHES: dict[str, Callable[[Bench], None]] = {
    "safetensors": safetensors,
    "small": small_pages,
    "cast": cast,
    "zip": torch_zip,
    "tiny": tiny,
}


if __name__ == "__main__":
    run_those_asked_for(__doc__, BENCHES, Bench)
