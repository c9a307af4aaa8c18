"""Hooks that page blocks in and out: nested, recursive, interrupted, in threads, and on a device
whose copies come late.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from late_lane import LateLane
from shardkit.errors import ShardkitError
from shardkit.load import close
from shardkit.load.dispatch import attach
from shardkit.load.dispatch.accelerate_api import load_checkpoint_and_dispatch
from shardkit.load.lazy.streamed_weight import Streamed
from shardkit.load.modules.torch_modes import eager
from shardkit.load.streaming.prefetcher import Stream

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.inner: Callable[[torch.Tensor], torch.Tensor] = lambda x: x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.a(x)
        y: torch.Tensor = self.a(self.inner(before))
        return y


def blocks(count: int = 6) -> list[Block]:
    torch.manual_seed(0)
    return [Block() for _ in range(count)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(nn.Sequential(*blocks()).state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def streaming(file: Path, *, ring: int = 2) -> nn.Sequential:
    return load_checkpoint_and_dispatch(nn.Sequential(*blocks()), file, {"": "disk"}, ring=ring)


def at(model: nn.Sequential, number: int) -> Block:
    found = model[number]
    assert isinstance(found, Block)
    return found


def away(model: nn.Module) -> bool:
    return all(isinstance(weight, Streamed) for weight in model.parameters())


X = torch.ones(2, WIDTH)


def nest(model: nn.Sequential) -> nn.Sequential:
    """Each block calls the next in the middle of its forward."""
    for number in range(len(model) - 1):
        at(model, number).inner = lambda x, following=number + 1: model[following](x)  # type: ignore[misc]  # a default for an index
    return model


def test_blocks_that_call_each_other_need_more_than_the_ring_and_get_it(file: Path) -> None:
    model, same = nest(streaming(file)), nest(nn.Sequential(*blocks()))
    expected = same[0](X)
    for _ in range(3):
        assert torch.equal(model[0](X), expected)
        assert away(model)


def test_threads_with_blocks_that_call_each_other_do_not_stop(file: Path) -> None:
    model, same = nest(streaming(file)), nest(nn.Sequential(*blocks()))
    expected = same[0](X)
    right: list[bool] = []

    def run() -> None:
        right.extend(torch.equal(model[0](X), expected) for _ in range(30))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert right == [True] * 120
    assert away(model)


def test_a_block_may_call_itself(file: Path) -> None:
    def recursive(model: nn.Sequential) -> torch.Tensor:
        depth = iter(range(3))
        block = at(model, 2)
        block.inner = lambda x: block(x) if next(depth, None) is not None else x
        found: torch.Tensor = block(X)
        return found

    model = streaming(file)
    assert torch.equal(recursive(model), recursive(nn.Sequential(*blocks())))
    assert away(model)


def test_an_interrupt_that_is_caught_inside_a_forward_ends_only_what_it_left(file: Path) -> None:
    model, same = streaming(file), nn.Sequential(*blocks())

    def interrupt(x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    for each in (model, same):
        at(each, 1).inner = interrupt

        def catching(x: torch.Tensor, each: nn.Sequential = each) -> torch.Tensor:
            with contextlib.suppress(KeyboardInterrupt):
                each[1](x)
            found: torch.Tensor = each[3](x)
            return found

        at(each, 0).inner = catching
    for _ in range(5):
        assert torch.equal(model[0](X), same[0](X))
        assert away(model)


def test_an_interrupt_when_a_block_that_was_written_ends_keeps_what_was_written(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, same = streaming(file, ring=8), nn.Sequential(*blocks())
    twin = copy.deepcopy(model)
    expected = same(X)
    handle = at(model, 2).a.register_forward_hook(lambda module, *_: module.weight.zero_() and None)
    release = Stream.release

    def interrupted(stream: Stream, *args: object, written: bool = False) -> None:
        if written:
            monkeypatch.undo()
            raise KeyboardInterrupt
        release(stream, *args, written=written)  # type: ignore[arg-type]  # as it was called

    monkeypatch.setattr(Stream, "release", interrupted)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(X)
    handle.remove()
    with torch.no_grad():
        at(same, 2).a.weight.zero_()
        for _ in range(2):
            assert torch.equal(model(X), same(X))
            assert torch.equal(twin(X), expected)


def test_a_pre_hook_that_fails_leaves_nothing(file: Path) -> None:
    model = streaming(file)

    def fail(*_: object) -> None:
        raise ValueError("on purpose")

    for prepend in (False, True):
        handle = at(model, 1).register_forward_pre_hook(fail, prepend=prepend)
        with pytest.raises(ValueError, match="on purpose"):
            model(X)
        assert away(model)
        handle.remove()


def test_a_weight_that_cannot_be_read_is_told_and_leaves_nothing(file: Path) -> None:
    model = streaming(file)
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(ShardkitError, match="cannot be read"):
        at(model, 4)(X)
    assert away(model)
    file.write_bytes(content)


def test_hooks_of_others_find_the_weights_there_and_then_gone(file: Path) -> None:
    model = streaming(file)
    seen: list[bool] = []

    def look(module: nn.Module, *_: object) -> None:
        seen.append(isinstance(at(model, 1).a.weight, Streamed))

    at(model, 1).register_forward_pre_hook(look)
    at(model, 1).register_forward_hook(look)
    model(X)
    assert seen == [False, True]


def test_a_copy_in_the_middle_of_a_forward_is_right(file: Path) -> None:
    model, same = streaming(file), nn.Sequential(*blocks())
    copies: list[nn.Sequential] = []

    def take(x: torch.Tensor) -> torch.Tensor:
        at(model, 2).inner = lambda x: x
        copies.append(copy.deepcopy(model))
        return x

    at(model, 2).inner = take
    with torch.no_grad():
        model(X)
        for _ in range(2):
            assert torch.equal(copies[0](X), same(X))


def test_a_close_in_the_middle_of_a_forward_lets_it_end_and_leaves_no_thread(file: Path) -> None:
    before = set(threading.enumerate())
    model = streaming(file)
    expected = model(X)
    model[3].register_forward_pre_hook(lambda *_: close(model))
    assert torch.equal(model(X), expected)
    assert away(model)
    assert (
        not {
            thread for thread in threading.enumerate() if thread.name.startswith("shardkit-stream")
        }
        - before
    )


def test_what_was_dispatched_is_freed_when_nobody_has_it(file: Path) -> None:
    model = streaming(file)
    model(X)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_hook_is_hidden_from_the_compiler_only_once_it_is_there() -> None:
    calls: list[int] = []
    hook = eager(calls.append)
    hook(1)
    pytest.importorskip("torch._dynamo")
    hook(2)
    assert calls == [1, 2]
    assert "torch._dynamo" in sys.modules


def test_a_model_is_right_on_a_device_whose_copies_come_late(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = LateLane()
    monkeypatch.setattr(attach, "lane_to", lambda device: lane)
    model, same = streaming(file), nn.Sequential(*blocks())
    expected = same(X)
    right: list[bool] = []

    def run() -> None:
        with torch.no_grad():
            right.extend(torch.equal(model(X), expected) for _ in range(50))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert right == [True] * 200
    assert lane.bytes <= 2 * 4 * (WIDTH * WIDTH + 2 * WIDTH)
