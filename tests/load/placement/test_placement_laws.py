"""What holds of every device map, whatever the model and the budgets; and that it is Accelerate's
wherever Accelerate is right.

Where it is not, it is one of these, which `test_placement` shows one by one: ties, buffers of a
part that is split, sizes of what becomes wider, names that begin alike.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from libraries import as_of, peer
from shardkit.load.devices.device_lookup import device_of
from shardkit.load.modules.sizes import Layers, module_sizes, named_tensors, parts, prefixes
from shardkit.load.placement.device_map import check_device_map
from shardkit.load.placement.infer_device_map import get_balanced_memory, infer_auto_device_map

theirs = peer("accelerate.utils")

Budgets = dict[Any, Any]  # as a user writes them
CLASSES = st.sampled_from([(), ("Block",), ("Group",), ("Block", "Group", "Linear")])
PLAIN = (torch.float32,)
MIXED = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.int8,
    torch.bool,
)


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)  # Accelerate warns of devices that this machine has not
    yield
    logging.disable(logging.NOTSET)


class Block(nn.Module):
    pass


class Group(nn.Module):
    pass


@st.composite
def models(
    draw: st.DrawFn, *, ties: bool = False, dtypes: tuple[torch.dtype, ...] = PLAIN
) -> nn.Module:
    """Blocks and groups of each other, of layers, and of bare tensors; with *ties*, some weights
    are an earlier layer's.
    """
    linears: list[nn.Linear] = []
    count = iter(range(10**6))

    def tensor() -> torch.Tensor:
        return torch.empty(draw(st.integers(1, 40)), dtype=draw(st.sampled_from(dtypes)))

    def linear() -> nn.Linear:
        made = nn.Linear(
            draw(st.integers(1, 9)),
            draw(st.integers(1, 9)),
            dtype=draw(st.sampled_from(dtypes[:4])),
        )
        if ties and linears and draw(st.integers(0, 3)) == 0:
            made.weight = draw(st.sampled_from(linears)).weight
        linears.append(made)
        return made

    def grown(depth: int) -> nn.Module:
        module = draw(st.sampled_from([Block, Group]))()
        for _ in range(draw(st.integers(1, 4))):
            # Names that differ in more than their ends, because Accelerate looks for a name inside
            # of others.
            name = f"part{next(count):04}"
            match draw(
                st.sampled_from(["module", "linear", "norm", "parameter", "buffer", "nothing"])
            ):
                case "module" if depth < 3:
                    module.add_module(name, grown(depth + 1))
                case "norm":
                    module.add_module(name, nn.BatchNorm1d(draw(st.integers(1, 9))))
                case "parameter":
                    module.register_parameter(name, nn.Parameter(tensor(), requires_grad=False))
                case "buffer" if ties or not depth:  # deeper down, Accelerate forgets them
                    module.register_buffer(name, tensor())
                case "nothing":
                    module.add_module(name, nn.Dropout())
                case _:
                    module.add_module(name, linear())
        return module

    with torch.device("meta"):
        return grown(0)


@st.composite
def budgets_for(draw: st.DrawFn, model: nn.Module, least: int = 0) -> Budgets:
    total = module_sizes(model)[""]
    room = st.integers(least, max(least, total + 10))
    return {
        **{number: draw(room) for number in range(draw(st.integers(0, 3)))},
        "cpu": draw(room),
        "disk": 10 * total,
    }


def held(model: nn.Module, device_map: dict[Any, Any], sizes: dict[str, int]) -> Counter[Any]:
    """Bytes on each device; what is tied counts once."""
    bytes_on: Counter[Any] = Counter()
    for name, _ in named_tensors(model):
        bytes_on[device_of(name, device_map)] += sizes[name]
    return bytes_on


def in_order(model: nn.Module) -> Iterator[str]:
    """All names of tensors as they are placed."""
    stack = list(reversed(parts("", model)))
    while stack:
        name, node = stack.pop()
        if isinstance(node, nn.Module):
            stack += reversed(parts(name, node))
        else:
            yield name


@given(st.data())
def test_maps_are_accelerates_where_it_is_right(data: st.DataObject) -> None:
    model = data.draw(models())
    budgets = data.draw(budgets_for(model))
    options: dict[str, Any] = {
        "no_split_module_classes": list(data.draw(CLASSES)),
        "fallback_allocation": data.draw(st.booleans()),
        "clean_result": data.draw(st.booleans()),
        "dtype": data.draw(st.sampled_from([None, "float16", torch.bfloat16])),
        "offload_buffers": True,
    }
    ours = infer_auto_device_map(model, budgets, **options)
    assert ours == theirs.infer_auto_device_map(model, dict(budgets), **options)


@as_of("accelerate", "1.15")  # an older one has torch make a device of each number
@given(st.data())
def test_balanced_budgets_are_accelerates_where_it_is_right(data: st.DataObject) -> None:
    model = data.draw(models())
    budgets = data.draw(budgets_for(model, least=1))
    del budgets["disk"]  # which Accelerate takes for an accelerator
    low_zero = data.draw(st.booleans())
    ours: Budgets = dict(get_balanced_memory(model, budgets, low_zero=low_zero))
    assert ours == theirs.get_balanced_memory(model, dict(budgets), low_zero=low_zero)
    assert all(0 <= ours[device] <= budgets[device] for device in budgets)
    placed = infer_auto_device_map(model, ours, offload_buffers=True)
    assert placed == theirs.infer_auto_device_map(model, dict(ours), offload_buffers=True)


@given(st.data())
def test_every_tensor_has_one_device_which_has_room_for_it(data: st.DataObject) -> None:
    model = data.draw(models(ties=True, dtypes=MIXED))
    budgets = data.draw(budgets_for(model))
    dtype = data.draw(st.sampled_from([None, torch.float16, torch.float32]))
    classes = data.draw(CLASSES)
    fallback = data.draw(st.booleans())
    written = dict(budgets)
    made = infer_auto_device_map(
        model, budgets, classes, dtype, fallback_allocation=fallback, offload_buffers=True
    )
    assert budgets == written
    check_device_map(model, made)
    bytes_on = held(model, made, module_sizes(model, dtype))
    assert all(bytes_on[device] <= budget for device, budget in budgets.items() if device != "disk")
    plain = infer_auto_device_map(
        model,
        budgets,
        classes,
        dtype,
        fallback_allocation=fallback,
        offload_buffers=True,
        clean_result=False,
    )
    names = list(model.state_dict())
    assert [device_of(name, made) for name in names] == [device_of(name, plain) for name in names]
    assert all(sum(each in plain for each in prefixes(name)) == 1 for name in names)


@given(st.data())
def test_what_is_tied_or_must_stay_whole_is_on_one_device(data: st.DataObject) -> None:
    model = data.draw(models(ties=True, dtypes=MIXED))
    budgets = data.draw(budgets_for(model))
    classes = data.draw(CLASSES)
    made = infer_auto_device_map(model, budgets, classes, offload_buffers=True)
    homes: dict[int, set[Any]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        homes.setdefault(id(tensor), set()).add(device_of(name, made))
    assert all(len(devices) == 1 for devices in homes.values())
    for name, module in model.named_modules():
        if name and type(module).__name__ in classes:
            assert len({device_of(f"{name}.{each}", made) for each in module.state_dict()}) <= 1


@given(st.data())
def test_devices_are_filled_in_their_order_and_keep_room_for_what_is_brought_to_them(
    data: st.DataObject,
) -> None:
    model = data.draw(models(dtypes=MIXED))
    budgets = data.draw(budgets_for(model))
    classes = data.draw(CLASSES)
    made = infer_auto_device_map(model, budgets, classes, offload_buffers=True)
    order = [*budgets]
    assert order[-2:] == ["cpu", "disk"]
    places = [order.index(device_of(name, made)) for name in in_order(model)]
    assert places == sorted(places)
    sizes = module_sizes(model)
    bytes_on = held(model, made, sizes)
    layers = Layers(sizes, frozenset(classes))
    whole = [
        name
        for name, module in model.named_modules()
        if name and layers.is_whole(module) and sizes.get(name)
    ]
    for keeper in {order[0], "cpu"}:
        later = [
            sizes[name]
            for name in whole
            if order.index(device_of(name, made)) > order.index(keeper)
        ]
        if bytes_on[keeper]:
            assert bytes_on[keeper] + max(later, default=0) <= budgets[keeper]
