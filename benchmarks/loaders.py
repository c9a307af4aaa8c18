"""Load a checkpoint onto the CPU and touch every byte of it, as a process: ``python
benchmarks/loaders.py JOB PATH [small]``.

What counts is printed last: the seconds from the call that loads to the last byte touched, imports
and the empty model apart. With ``small``, Linux gives the process no huge pages, whatever it asks
for.
"""

from __future__ import annotations

import ctypes
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from llama import WIDE
from torch import nn

Shapes = Iterable[tuple[str, tuple[int, ...]]]
Job = Callable[[str], Callable[[], nn.Module]]

_STEP = 64 << 20
_PAGE = 4096
_PR_SET_THP_DISABLE = 41  # linux/prctl.h


def shardkit(path: str) -> Callable[[], nn.Module]:
    """Weights in memory of the model's own."""
    from shardkit.load import load_checkpoint_in_model

    return _into_empty(path, lambda model: load_checkpoint_in_model(model, path, {"": "cpu"}))


def shardkit_mmap(path: str) -> Callable[[], nn.Module]:
    """Weights that share the page cache."""
    from shardkit.load import load_checkpoint_in_model

    return _into_empty(
        path, lambda model: load_checkpoint_in_model(model, path, {"": "cpu"}, mmap=True)
    )


def shardkit_cast(path: str) -> Callable[[], nn.Module]:
    """The first, into a model of float32."""
    from shardkit.load import load_checkpoint_in_model

    return _into_empty(
        path, lambda model: load_checkpoint_in_model(model, path, {"": "cpu"}), torch.float32
    )


def accelerate(path: str, dtype: torch.dtype = torch.bfloat16) -> Callable[[], nn.Module]:
    """The function of the same name."""
    from accelerate import load_checkpoint_in_model  # type: ignore[import-untyped]  # has no types

    return _into_empty(
        path, lambda model: load_checkpoint_in_model(model, path, {"": "cpu"}), dtype
    )


def accelerate_cast(path: str) -> Callable[[], nn.Module]:
    """The same, into a model of float32."""
    return accelerate(path, torch.float32)


def fastsafetensors(path: str) -> Callable[[], nn.Module]:
    """IBM's reader, without the direct storage that only GPUs have."""
    from fastsafetensors import fastsafe_open  # type: ignore[import-not-found, import-untyped, unused-ignore]  # a peer

    def load(model: nn.Module) -> None:
        with fastsafe_open(path, framework="pt", device="cpu", nogds=True) as file:
            model.load_state_dict(
                {name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118 - it is no dict
                assign=True,
            )

    return _into_empty(path, load)


def runai(path: str) -> Callable[[], nn.Module]:
    """Run:ai's streamer; its tensors are views of the memory that it reads into."""
    from runai_model_streamer import SafetensorsStreamer  # type: ignore[import-not-found, import-untyped, unused-ignore]

    def load(model: nn.Module) -> None:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files([path])
            model.load_state_dict(dict(streamer.get_tensors()), assign=True)

    return _into_empty(path, load)


def transformers(path: str) -> Callable[[], nn.Module]:
    """from_pretrained, which makes the empty model too."""
    from transformers import LlamaForCausalLM

    return lambda: LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


def assigned(path: str) -> Callable[[], nn.Module]:
    """The file as its own library reads it, assigned: safetensors.torch.load_file, or torch.load
    with mmap=True.
    """
    from safetensors.torch import load_file

    def load(model: nn.Module) -> None:
        safe = path.endswith(".safetensors")
        state = load_file(path) if safe else torch.load(path, mmap=True, weights_only=True)
        model.load_state_dict(state, assign=True)

    return _into_empty(path, load)


def copy(path: str) -> Callable[[], nn.Module]:
    """The limit: as many bytes, from memory that is warm into memory that is fresh and as good as
    there is.
    """
    from shardkit.load.memory.allocate import aligned
    from shardkit.load.memory.parallel_reads import WORKERS

    threads = torch.get_num_threads()
    shapes = [shape for _, shape in _shapes(path)]
    nbytes = sum(2 * torch.Size(shape).numel() for shape in shapes)
    warm = torch.ones(4 * _STEP, dtype=torch.uint8)

    def run() -> nn.Module:
        model = nn.Module()
        torch.set_num_threads(1)  # of torch's own, beside those of the pool
        with ThreadPoolExecutor(WORKERS) as pool:
            for number, tensor in enumerate(pool.map(step, range(nbytes // _STEP))):
                model.register_buffer(str(number), tensor)
        torch.set_num_threads(threads)
        return model

    def step(number: int) -> torch.Tensor:
        at = number % 4 * _STEP
        return aligned(_STEP).copy_(warm[at : at + _STEP])

    return run


JOBS: dict[str, Job] = {
    "shardkit": shardkit,
    "shardkit-mmap": shardkit_mmap,
    "shardkit-cast": shardkit_cast,
    "accelerate": accelerate,
    "accelerate-cast": accelerate_cast,
    "fastsafetensors": fastsafetensors,
    "runai": runai,
    "transformers": transformers,
    "assigned": assigned,
    "copy": copy,
}


def _into_empty(
    path: str, load: Callable[[nn.Module], object], dtype: torch.dtype = torch.bfloat16
) -> Callable[[], nn.Module]:
    model = _empty(_shapes(path), dtype)

    def run() -> nn.Module:
        load(model)
        return model

    return run


def _shapes(path: str) -> Shapes:
    return (
        ((f"layers.{number}.weight", (16,)) for number in range(50_000))
        if "tiny" in path
        else WIDE.shapes()
    )


def _empty(shapes: Shapes, dtype: torch.dtype) -> nn.Module:
    """Modules as the names have them, with parameters of *dtype* on the meta device; those of
    tiny.pt are float32.
    """
    model = nn.Module()
    for name, shape in shapes:
        *steps, last = name.split(".")
        module = model
        for step in steps:
            if step not in module._modules:
                module.add_module(step, nn.Module())
            module = module.get_submodule(step)
        kind = torch.float32 if shape == (16,) else dtype
        module.register_parameter(last, nn.Parameter(torch.empty(shape, dtype=kind, device="meta")))
    return model


def _touch(model: nn.Module) -> None:
    tensors = [*model.parameters(), *model.buffers()]
    with torch.no_grad():
        for tensor in tensors:
            if tensor.nbytes >= _PAGE:
                tensor.view(-1).view(torch.int64).sum()
        # At once, and as they are: it is their memory that is touched, and not the patience of
        # torch with many tensors.
        torch.cat([tensor for tensor in tensors if tensor.nbytes < _PAGE] or [torch.empty(0)])


def main() -> None:
    """Run the job that is asked for."""
    warnings.simplefilter("ignore")
    if sys.argv[3:] == ["small"] and ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0):
        sys.exit("this system does not let a process do without huge pages")
    run = JOBS[sys.argv[1]](sys.argv[2])
    begun = time.perf_counter()
    _touch(run())
    print(time.perf_counter() - begun)


if __name__ == "__main__":
    main()
