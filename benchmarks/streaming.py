"""One contender of stream.py: ``python benchmarks/streaming.py DTYPE WHO SOURCE RESIDENT RING
TOKENS FORWARDS HOW CACHE``.

Prints one line of JSON: the seconds of each forward, those that shardkit says it waited for
weights, the bytes that the process really read for it, what came out, and what the process held:
before the model, after each forward, and after the end of it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llama import BY_DTYPE, LAYERS, VOCABULARY, Llama
from measuring import in_page_cache

RING_READ, THREADS = 4 << 20, 3
GREEDY = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
PLANNED = 1_000_000_000  # bytes, of the 1.5 GB that stream.py gives
WATCHED: list[Any] = []  # the stream of the model, if it has one
MODELS: list[Any] = []  # of shardkit, to be closed
HOW: list[str] = []  # whether a forward is called, or `generate` for one token


def main() -> None:
    """Run the one that is named."""
    dtype, who, source, resident, ring, tokens, forwards, how, cache = sys.argv[1:]
    HOW.append(how)
    if who in ("shardkit", "cast", "planned", "beside"):
        load_libraries(BY_DTYPE[dtype])
    held = [holding()]
    once = CONTENDERS[who](BY_DTYPE[dtype], Path(source), int(resident), int(ring), int(tokens))
    once()  # which fills what is filled once
    seconds, waited, read, told = [], [], [], None
    for _ in range(int(forwards)):
        if cache == "cold":
            evict(Path(source))
        else:
            warm(Path(source))
        before, waits, begun = really_read(), waited_for(), time.perf_counter()
        told = once()
        seconds.append(time.perf_counter() - begun)
        read.append(really_read() - before)
        waited.append(waited_for() - waits)
        held.append(holding())
    del once
    held.append(end())
    print(
        json.dumps(
            {
                "seconds": seconds,
                "waited": waited,
                "read": read,
                "told": told,
                "peak": peak(),
                "held": held,
            }
        )
    )


def load_libraries(llama: Llama) -> None:
    """Have what is in memory once and for all before anything is counted: code, and the threads
    that compute.
    """
    import torch

    llama.empty()
    torch.ones(512, 512) @ torch.ones(512, 512)


def end() -> dict[str, int]:
    """Close what is running, let go of it, and tell what is held then."""
    if MODELS:
        from shardkit.load import close

        close(MODELS.pop())
    WATCHED.clear()
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)  # what is free, and the allocator keeps
    return holding()


def holding() -> dict[str, int]:
    """What the process holds: memory that is no file's, in bytes, descriptors and threads."""
    status = Path("/proc/self/status").read_text().splitlines()
    memory = sum(
        int(line.split()[1]) * 1024 for line in status if line.startswith(("RssAnon", "RssShmem"))
    )
    return {
        "memory": memory,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def waited_for() -> float:
    """Seconds that forwards of shardkit waited for weights so far."""
    return float(WATCHED[0].counts.waited) if WATCHED else 0.0


def evict(source: Path) -> None:
    """Evict the source from the page cache."""
    for path in files_of(source):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def warm(source: Path) -> None:
    """Let the page cache have the source."""
    for path in files_of(source):
        in_page_cache(path)


def files_of(source: Path) -> list[Path]:
    """The files that hold weights."""
    return sorted(source.rglob("*.safetensors")) if source.is_dir() else [source]


def really_read() -> int:
    """Bytes that this process had fetched from the disk so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def peak() -> int:
    """The most memory that this process had, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def where(resident: int) -> dict[str, str]:
    """A device map; the resident layers are spread."""
    first = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    step = LAYERS / max(1, resident)
    held = {int(number * step) for number in range(resident)}
    layers = {
        f"model.layers.{number}": "cpu" if number in held else "disk" for number in range(LAYERS)
    }
    return first | layers | {"lm_head": "cpu" if resident == LAYERS else "disk"}


def forward(
    model: Any, tokens: int
) -> Callable[[], float | None]:  # Any: as transformers leaves it
    """What runs it once, and tells what came out."""
    import torch

    ids = (torch.arange(tokens) * 7 % VOCABULARY)[None]

    def once() -> float:
        with torch.no_grad():
            if HOW == ["generate"]:
                return float(
                    model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)[0, -1]
                )
            return float(model(ids, use_cache=False, logits_to_keep=1).logits.double().sum())

    return once


def shardkit(
    llama: Llama, source: Path, resident: int, ring: int, tokens: int
) -> Callable[[], float | None]:
    """This package."""
    return dispatched(llama.empty(), source, resident, ring, tokens)


def cast(
    llama: Llama, source: Path, resident: int, ring: int, tokens: int
) -> Callable[[], float | None]:
    """The same, into a model of float32."""
    return dispatched(llama.empty().float(), source, resident, ring, tokens)


def dispatched(
    model: Any, source: Path, resident: int, ring: int, tokens: int
) -> Callable[[], float | None]:
    """What runs *model*, which is empty."""
    from shardkit.load import load_checkpoint_and_dispatch
    from shardkit.load.dispatch.attachments import attachments
    from shardkit.load.hooks.streaming_hooks import Pager

    model = load_checkpoint_and_dispatch(
        model,
        source,
        where(resident),
        no_split_module_classes=["LlamaDecoderLayer"],
        ring=ring or None,
    )
    MODELS.append(model)
    WATCHED.extend(each.stream for *_, each in attachments(model) if isinstance(each, Pager))
    return forward(model, tokens)


def planned(
    llama: Llama, source: Path, resident: int, ring: int, tokens: int
) -> Callable[[], float | None]:
    """This package, which chooses what is resident within the memory that the limit leaves beside
    torch.
    """
    from shardkit.load import load_checkpoint_and_dispatch

    model = load_checkpoint_and_dispatch(
        llama.empty(),
        source,
        "auto",
        {"cpu": PLANNED},
        no_split_module_classes=["LlamaDecoderLayer"],
        ring=ring or None,
    )
    MODELS.append(model)
    return forward(model, tokens)


def reading(
    llama: Llama, source: Path, resident: int, ring: int, tokens: int
) -> Callable[[], float | None]:
    """This package, which brings every block to where it would be used, and computes nothing."""
    from shardkit.load import load_checkpoint_and_dispatch
    from shardkit.load.dispatch.attachments import attachments
    from shardkit.load.hooks.streaming_hooks import Pager

    model = load_checkpoint_and_dispatch(
        llama.empty(),
        source,
        where(resident),
        no_split_module_classes=["LlamaDecoderLayer"],
        ring=ring,
    )
    stream = next(each.stream for *_, each in attachments(model) if isinstance(each, Pager))
    count = sum(device == "disk" for device in where(resident).values())

    def once() -> None:
        for number in range(count):
            stream.borrow(number, "benchmark")
            stream.release(number, "benchmark")

    return once


def accelerate(
    llama: Llama, source: Path, resident: int, ring: int, tokens: int
) -> Callable[[], float | None]:
    """Accelerate on its best input: it reads safetensors where they lie, and needs no copy of
    them.
    """
    from accelerate import dispatch_model  # type: ignore[import-untyped]  # as it comes
    from accelerate.utils import set_module_tensor_to_device  # type: ignore[import-untyped]  # likewise
    from safetensors import safe_open

    model, places = llama.empty(), where(resident)
    disk = tuple(f"{name}." for name, device in places.items() if device == "disk")
    index = {}
    for path in files_of(source):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                if name.startswith(disk):
                    index[name] = {
                        "safetensors_file": str(path),
                        "weight_name": name,
                        "dtype": llama.dtype,
                    }
                else:
                    set_module_tensor_to_device(model, name, "cpu", file.get_tensor(name).clone())
    return forward(dispatch_model(model, places, main_device="cpu", offload_index=index), tokens)


def airllm(
    llama: Llama, source: Path, resident: int, ring: int, tokens: int
) -> Callable[[], float | None]:
    """AirLLM, which has a file for each layer; it makes them when it sees the checkpoint first."""
    from contextlib import redirect_stdout

    with redirect_stdout(sys.stderr):  # where it tells what it does
        from airllm import AirLLMBaseModel  # type: ignore[import-not-found, import-untyped, unused-ignore]  # a peer

        class Untokenized(AirLLMBaseModel):  # type: ignore[misc, unused-ignore]  # of a class without types
            def get_tokenizer(self, hf_token: object = None) -> None:
                """None: what goes in is numbers."""

        once = forward(Untokenized(str(source), device="cpu"), tokens)

    def quietly() -> float | None:
        with redirect_stdout(sys.stderr):
            return once()

    return quietly


def floor(
    llama: Llama, source: Path, resident: int, ring: int, tokens: int
) -> Callable[[], float | None]:
    """The same blocks into a ring of the same size, and nothing else."""
    blocks = list(runs(source, resident))
    sizes = sorted((stop - start for _, start, stop in blocks), reverse=True)
    room = -(-sum(sizes[:ring]) // RING_READ) * RING_READ
    memory = huge(room)
    direct = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path, _, _ in blocks}

    def once() -> None:
        reads = iter(
            [
                (direct[path], at, stop)
                for path, start, stop in blocks
                for at in range(start, stop, RING_READ)
            ]
        )
        lock, place = threading.Lock(), iter(range(1 << 62))

        def work() -> None:
            while True:
                with lock:
                    found, number = next(reads, None), next(place)
                if found is None:
                    return
                file, at, stop = found
                begin = number * RING_READ % room
                os.preadv(file, [memory[begin : begin + min(RING_READ, stop - at)]], at)

        threads = [threading.Thread(target=work) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return once


def beside(
    llama: Llama, source: Path, resident: int, ring: int, tokens: int
) -> Callable[[], float | None]:
    """All of the model in memory, and the same blocks read for nothing while it computes: what
    reading takes from computing.
    """
    compute, read = (
        shardkit(llama, source, LAYERS, ring, tokens),
        floor(llama, source, resident, ring, tokens),
    )

    def once() -> float | None:
        reading = threading.Thread(target=read)
        reading.start()
        told = compute()
        reading.join()
        return told

    return once


def runs(source: Path, resident: int) -> Iterator[tuple[Path, int, int]]:
    """For each block that streams its sectors of the source."""
    import shardkit

    disk = [name for name, device in where(resident).items() if device == "disk"]
    extents = {entry.name: entry.payload.sources[0] for entry in shardkit.open(source).tensors}
    for block in disk:
        inside = [extent for name, extent in extents.items() if name.startswith(f"{block}.")]
        start, stop = (
            min(each.start for each in inside),
            max(each.start + each.nbytes for each in inside),
        )
        yield inside[0].path, start // 4096 * 4096, -(-stop // 4096) * 4096


def huge(nbytes: int) -> memoryview:
    """Memory in huge pages."""
    mapping = mmap.mmap(-1, nbytes + (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(mapping)) % (2 << 20)
    return memoryview(mapping)[start : start + nbytes]


CONTENDERS = {
    "shardkit": shardkit,
    "cast": cast,
    "planned": planned,
    "reading": reading,
    "accelerate": accelerate,
    "airllm": airllm,
    "floor": floor,
    "beside": beside,
}

if __name__ == "__main__":
    main()
