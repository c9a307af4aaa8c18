"""How well explain predicts: ``python benchmarks/predict.py --folder BIG [--tokens 16]``.

The model has the shape of Llama, 40 layers, 4.4 GB, and runs on the CPU. All of its layers stream
from disk, or every second one, or as many as "auto" leaves no room for. Each map is a process of
its own: forwards, before each of which the page cache forgets the checkpoint, and then the
prediction, with rates that are measured in the same minute.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from llama import BY_DTYPE, LAYERS, VOCABULARY, Llama, suited
from measuring import made

TOLERANCE = 0.2
DeviceMap = str | Mapping[str, str]
_REST = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
MAPS: dict[str, DeviceMap] = {
    "all on disk": {**_REST, "model.layers": "disk", "lm_head": "disk"},
    "half of it": {
        **_REST,
        **{f"model.layers.{number}": "disk" if number % 2 else "cpu" for number in range(LAYERS)},
        "lm_head": "disk",
    },
    "auto, 2 GB": "auto",
}


def main() -> None:
    """Run all maps, or the one that is named, of which the result is printed as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the checkpoint is, or is made"
    )
    parser.add_argument(
        "--dtype",
        choices=BY_DTYPE,
        default=suited().dtype,
        help="by default what this processor computes in",
    )
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--forwards", type=int, default=4)
    parser.add_argument("--map", choices=MAPS)
    asked = parser.parse_args()
    llama = BY_DTYPE[asked.dtype]
    source = made(asked.folder, llama.plain)
    if asked.map:
        print(json.dumps(told(llama, source, MAPS[asked.map], asked.tokens, asked.forwards)))
        return
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in MAPS}
    for _ in range(asked.rounds):
        for name in MAPS:
            command = [sys.executable, __file__, *sys.argv[1:], "--map", name]
            results[name].append(
                json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            )
    for name, each in results.items():
        print(f"{name:12} " + "; ".join(map(sentence, each)))
        ratios = sorted(one["predicted"]["seconds"] / one["seconds"] for one in each)
        within = sum(abs(1 - ratio) <= TOLERANCE for ratio in ratios)
        print(
            f"{'':12} predicted is {median(ratios):.2f} x measured ({ratios[0]:.2f} to "
            f"{ratios[-1]:.2f}), "
            f"{within} of {len(ratios)} within {TOLERANCE:.0%}; limit: "
            f"{each[-1]['predicted']['limit']}"
        )


def told(
    llama: Llama, source: Path, device_map: DeviceMap, tokens: int, forwards: int
) -> dict[str, Any]:
    """What explain says after some forwards, and their median in seconds."""
    import torch

    from shardkit.load import explain, load_checkpoint_and_dispatch

    options: dict[str, Any] = {
        "max_memory": {"cpu": "2GB"},
        "no_split_module_classes": ["LlamaDecoderLayer"],
    }
    options["ring"] = (
        # so that rates are not measured now, with some of the checkpoint in the page cache, but
        # after the forwards
        4
    )
    model = load_checkpoint_and_dispatch(llama.empty(), source, device_map, **options)
    ids = (torch.arange(tokens) * 7 % VOCABULARY)[None]
    seconds = [
        timed(lambda: model(ids, use_cache=False, logits_to_keep=1), source)
        for _ in range(forwards + 1)
    ]
    explanation = explain(model)
    print(explanation, file=sys.stderr)
    return {**explanation.as_dict(), "seconds": median(seconds[1:])}


def timed(forward: Callable[[], object], source: Path) -> float:
    """Seconds of *forward*, with nothing of *source* in the page cache."""
    import torch

    file = os.open(source, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)
    begun = time.perf_counter()
    with torch.no_grad():
        forward()
    return time.perf_counter() - begun


def sentence(one: Mapping[str, Any]) -> str:
    """The figures of one process."""
    return f"{one['predicted']['seconds']:.2f} s predicted, {one['seconds']:.2f} s measured"


if __name__ == "__main__":
    main()
