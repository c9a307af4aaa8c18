"""How fast a checkpoint comes into an empty model on the CPU, beside what others would run and what the memory allows.

    python benchmarks/load.py [--folder FOLDER] [--rounds N] [--only NAME ...]

The page cache is warm, and every byte is touched once after loading, so that lazily mapped pages flatter nobody. Contenders
take turns within one run; what is printed are medians, their ratio to the first, and the largest peak of memory. Before each, a
process takes as much memory and returns it: the host of a virtual machine is slow to give memory that was not used for a while.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from llama import LAYERS, VOCABULARY, WIDE
from measuring import Benching, Contender, in_page_cache, race, run_those_asked_for

_BESIDE = 500_000_000  # what a process with torch takes beside the weights
LOADERS = str(Path(__file__).parent / "loaders.py")


class Bench(Benching):
    """What is run, and on what."""

    def model_folder(self) -> Path:
        """big.safetensors as transformers takes it."""
        folder = self.folder / "llama"
        folder.mkdir(exist_ok=True)
        width = {"hidden_size": WIDE.hidden, "intermediate_size": WIDE.inner}
        sizes = {"num_hidden_layers": LAYERS, "num_attention_heads": 16, "vocab_size": VOCABULARY, **width}
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes}
        (folder / "config.json").write_text(json.dumps(config))
        weights = folder / "model.safetensors"
        if not weights.is_symlink():
            weights.symlink_to(self.source("big.safetensors").resolve())
        return folder


def loader(job: str, path: Path) -> Contender:
    """One of loaders.py."""
    return Contender((sys.executable, LOADERS, job, str(path)), tells=True)


def safetensors(bench: Bench) -> None:
    """4.4 GB of bf16."""
    path = bench.source("big.safetensors")
    contenders = {
        "copying into fresh memory": loader("copy", path),
        "shardkit": loader("shardkit", path),
        "shardkit, mmap=True": loader("shardkit-mmap", path),
        "safetensors + load_state_dict(assign=True)": loader("assigned", path),
        "accelerate": loader("accelerate", path),
        "transformers": loader("transformers", bench.model_folder()),
    }
    report("big.safetensors → CPU", contenders, bench, warm=path)


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


def report(title: str, contenders: Mapping[str, Contender], bench: Bench, *, warm: Path) -> None:
    """Race, and print a line for each contender; all are held against the first."""

    def before() -> None:
        in_page_cache(warm)
        subprocess.run([sys.executable, "-c", f"b'1' * {warm.stat().st_size + _BESIDE}"], check=True)

    medians = race(contenders, bench.rounds, before)
    first = next(iter(medians.values())).seconds
    print(title)
    for name, each in medians.items():
        print(f"  {name:54} {each}  {each.seconds / first:5.2f} ×", flush=True)
    print(flush=True)


BENCHES: dict[str, Callable[[Bench], None]] = {"safetensors": safetensors, "zip": torch_zip, "tiny": tiny}


if __name__ == "__main__":
    run_those_asked_for(__doc__, BENCHES, Bench)
