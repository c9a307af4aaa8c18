"""Which device each block goes to: the laws, and the same answer as the loader's device maps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shardkit.checkpoint.device_fit import fit
from shardkit.load.devices.device_lookup import device_of
from shardkit.load.modules.init_empty import init_empty_weights
from shardkit.load.placement.infer_device_map import infer_auto_device_map

SIZES = st.lists(st.integers(0, 30), max_size=20).map(
    lambda sizes: {f"block{at}": size for at, size in enumerate(sizes)}
)
BUDGETS = st.tuples(st.lists(st.integers(0, 150), max_size=3), st.integers(0, 150)).map(
    lambda drawn: {
        **{str(number): budget for number, budget in enumerate(drawn[0])},
        "cpu": drawn[1],
    }
)


@given(SIZES, BUDGETS)
def test_no_budget_is_exceeded_and_no_block_forgotten(
    sizes: dict[str, int], budgets: dict[str, int]
) -> None:
    fitted = fit(sizes, budgets)
    assert list(fitted.homes) == list(sizes)
    assert all(left >= 0 for left in fitted.left.values())
    assert sum(fitted.used.values()) == sum(sizes.values())
    order = [*budgets, "disk"]
    places = [order.index(home) for home in fitted.homes.values()]
    assert places == sorted(places)


@given(SIZES, BUDGETS)
def test_what_is_brought_has_room_unless_it_says_so(
    sizes: dict[str, int], budgets: dict[str, int]
) -> None:
    fitted = fit(sizes, budgets)
    for device, block in fitted.largest_loaded.items():
        assert fitted.left[device] + fitted.lacking.get(device, 0) >= sizes[block]
    assert not fitted.lacking or all(
        not fitted.used[device] or device not in fitted.lacking for device in budgets
    )


@given(SIZES, BUDGETS)
def test_what_fits_is_not_offloaded(sizes: dict[str, int], budgets: dict[str, int]) -> None:
    if sum(sizes.values()) <= next(iter(budgets.values())):
        assert set(fit(sizes, budgets).homes.values()) <= {next(iter(budgets))}


@given(SIZES, BUDGETS)
def test_it_is_what_the_loader_would_do(sizes: dict[str, int], budgets: dict[str, int]) -> None:
    with init_empty_weights():
        model = nn.ModuleDict(
            {name: nn.Linear(size, 1, bias=False) for name, size in sizes.items() if size}
        )
    sizes = {name: 4 * size for name, size in sizes.items() if size}
    device_map = infer_auto_device_map(
        model,
        {int(name) if name.isdecimal() else name: 4 * size for name, size in budgets.items()},
        offload_buffers=True,
    )
    fitted = fit(sizes, {name: 4 * size for name, size in budgets.items()})
    assert {name: str(device_of(name, device_map)) for name in sizes} == fitted.homes
