"""Objects of any shape are walked once, in order, in bounded time."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardkit.checkpoint.entries import OtherKind
from shardkit.dtypes import U8
from shardkit.errors import LimitExceeded, Malformed
from shardkit.limits import Limits
from shardkit.payloads.payload import Literal, Payload
from shardkit.pickles.objects import Dict, Opaque
from shardkit.pickles.torch_tensors import Storage, StorageClass, View
from shardkit.pickles.walk import Found, collect

PATH = Path("model.pt")
STORAGE = Storage(StorageClass(U8), "0", 4, 0, 4)
TENSOR = View(STORAGE, U8, 0, (4,), (1,))


def record(storage: Storage) -> Payload:
    return Literal(b"abcd")


def walked(root: object, limits: Limits | None = None) -> Found:
    return collect(PATH, root, record=record, limits=limits or Limits())


def table(**items: object) -> Dict:
    made = Dict()
    for name, value in items.items():
        made.put(name, value)
    return made


def test_one_tensor_under_two_names_is_two_entries_with_one_payload() -> None:
    first, second = walked(table(a=TENSOR, b=TENSOR)).tensors
    assert (first.path, second.path) == (("a",), ("b",))
    assert first.payload == second.payload


SHARED = table(w=TENSOR, note=[1])
LISTED = [SHARED, TENSOR]


@pytest.mark.parametrize(
    ("root", "names"),
    {
        "deeper first": (table(a=table(inner=SHARED), b=SHARED), ["a.inner.w", "b.w"]),
        "deeper last": (table(b=SHARED, a=table(inner=SHARED)), ["b.w", "a.inner.w"]),
        "in a list": ([SHARED, SHARED], ["0.w", "1.w"]),
        "shared in what is shared": (
            table(a=LISTED, b=[LISTED, SHARED]),
            ["a.0.w", "a.1", "b.0.0.w", "b.0.1", "b.1.w"],
        ),
        "in an object": (table(a=Opaque("x.Y", (SHARED,)), b=SHARED), ["a.0.w", "b.w"]),
    }.values(),
)
def test_a_container_gives_its_tensors_at_every_place(root: object, names: list[str]) -> None:
    found = walked(root)
    assert [entry.name for entry in found.tensors] == names
    assert len({entry.payload for entry in found.tensors}) == 1
    assert {other.reason for other in found.others} == {"a list of 1"}
    assert not found.notes


def test_a_structure_that_holds_itself_gives_its_tensors_at_every_place() -> None:
    inner = table(w=TENSOR)
    inner.put("parent", [inner])
    found = walked(table(a=inner, b=inner))
    assert [entry.name for entry in found.tensors] == ["a.w", "b.w"]
    assert [(other.name, other.kind, other.reason) for other in found.others] == [
        (name, OtherKind.OBJECT, "the same object as 'a'") for name in ("a.parent.0", "b.parent.0")
    ]


def test_places_that_are_too_many_to_name_are_weights_left_out_and_counted() -> None:
    many = [TENSOR] * 60_000
    found = walked(table(a=many, b=many, c=many, d=SHARED, e=SHARED))
    assert len(found.tensors) == 120_002
    (left,) = (other for other in found.others if other.is_weight)
    assert (left.name, left.nbytes) == ("c", 4)
    assert left.reason == "the same object as 'a', whose tensors would have too many names"
    assert found.notes == (
        (
            "1 place holds an object that the file has at another place too; the tensors in it are "
            "named at the other place only"
        ),
    )


@pytest.mark.timeout(60)  # to go all ways through it would take for ever
def test_many_containers_that_all_hold_each_other_take_no_time() -> None:
    ring: list[list[object]] = [[TENSOR] for _ in range(40)]
    for each in ring:
        each += ring
    found = walked(ring)
    assert found.tensors
    assert any(other.is_weight for other in found.others)


def test_a_cycle_ends() -> None:
    root = table(w=TENSOR)
    root.put("self", [root])
    found = walked(root)
    assert [entry.name for entry in found.tensors] == ["w"]
    assert [(other.name, other.reason) for other in found.others] == [
        ("self.0", "the same object as 'the root'")
    ]


def test_a_hundred_thousand_levels_are_walked() -> None:
    deep: object = TENSOR
    for level in range(100_000):
        deep = [deep] if level % 2 else table(k=deep)
    (entry,) = walked(deep).tensors
    assert len(entry.path) == 100_000


def test_names_that_take_too_much_room_hit_the_limit() -> None:
    deep: object = TENSOR
    for _ in range(20_000):
        deep = [TENSOR, deep]
    with pytest.raises(LimitExceeded) as caught:
        walked(deep, Limits(held_bytes=10_000_000))
    assert caught.value.limit == "held_bytes"


@pytest.mark.timeout(60)  # to go them all would take for ever
@pytest.mark.parametrize("leaf", [TENSOR, 1], ids=["with a tensor", "without"])
def test_billions_of_paths_to_a_few_objects_take_no_time(leaf: object) -> None:
    laughs: object = leaf
    for _ in range(100):
        laughs = (laughs,) * 10
    found = walked(table(a=laughs, b=TENSOR))
    assert bool(found.notes) is (leaf is TENSOR)
    assert len(found.tensors) < 200_000 if leaf is TENSOR else len(found.tensors) == 1


def test_keys_that_cannot_be_hashed_safely_still_lead_to_their_tensors() -> None:
    laughs: object = 1
    for _ in range(100):
        laughs = (laughs,) * 10
    odd = Dict()
    for key in (laughs, TENSOR, 1 << 100, Opaque("x")):
        odd.put(key, TENSOR)
    found = walked(odd)
    assert len({entry.name for entry in found.tensors}) == 4
    assert all(len(entry.name) < 200 for entry in found.tensors)


def test_a_subtree_without_tensors_is_one_object_at_its_top() -> None:
    found = walked(
        table(model=table(w=TENSOR, note=table(x=[1, 2])), optimizer=table(groups=[table(lr=1)]))
    )
    assert [(other.path, other.kind, other.reason) for other in found.others] == [
        (("model", "note"), OtherKind.OBJECT, "a dict of 1"),
        (("optimizer",), OtherKind.OBJECT, "a dict of 1"),
    ]


def test_objects_are_entered_by_their_arguments_items_keys_and_states() -> None:
    thing = Opaque("a.Thing", (TENSOR,), [1, TENSOR])
    thing.put("key", TENSOR)
    thing.states += [table(attribute=TENSOR), (None, table(slot=TENSOR)), TENSOR]
    assert [entry.path for entry in walked([thing]).tensors] == [
        ("0", "0"),
        ("0", "1"),
        ("0", "key"),
        ("0", "attribute"),
        ("0", "slot"),
        ("0", "state"),
    ]


@pytest.mark.parametrize(
    ("view", "fault"),
    [
        (View(STORAGE, U8, 0, (5,), (1,)), "its storage, which has 4"),
        (View(STORAGE, U8, 1, (2, 2), (2, 1)), "its storage, which has 4"),
        (View(STORAGE, U8, -1, (2,), (1,)), "-1"),
        (View(STORAGE, U8, 0, (-2,), (1,)), "-2"),
        (View(STORAGE, U8, 0, (2,), (-1,)), "-1"),
        (View(STORAGE, U8, 0, (2,), ()), "1 lengths and 0 strides"),
        (View(STORAGE, U8, 0, (1,) * 65, (1,) * 65), "65 lengths and 65 strides"),
        (View(STORAGE, U8, 0, (1 << 62, 4), (0, 0)), "larger than any memory"),
        (View(STORAGE, U8, 0, (1 << 5000,), (0,)), "an integer of 5001 bits"),
        (View(STORAGE, U8, 0, (2,), (1,), conj=True), "not complex"),
    ],
)
def test_a_view_that_its_storage_cannot_give_is_named(view: View, fault: str) -> None:
    with pytest.raises(Malformed, match=f"tensor 'w': .*{fault}"):
        walked(table(w=view))


def test_attributes_of_dicts_in_attributes_of_dicts_are_found_without_recursion() -> None:
    outer = table(w=TENSOR)
    inner = outer
    for _ in range(20_000):
        inner.state = table()
        inner = inner.state
    inner.state = table(w=TENSOR)
    around = table(w=TENSOR)
    around.state = around
    assert [entry.path[-1] for entry in walked(table(deep=outer, around=around)).tensors] == [
        "w",
        "w",
        "w",
    ]


def test_a_large_module_in_what_lies_at_two_places_is_counted_by_its_weights() -> None:
    def module(parameters: Dict, modules: Dict) -> Opaque:
        made = Opaque("x.Module")
        plain = {f"attribute{i}": i for i in range(40)}
        made.states.append(
            table(_parameters=parameters, _buffers=table(), _modules=modules, **plain)
        )
        return made

    net = module(
        table(), table(**{f"m{i}": module(table(w=TENSOR), table()) for i in range(5_000)})
    )
    shared = table(net=net)
    found = walked(table(a=shared, b=shared, c=shared))
    assert len(found.tensors) == 15_000
    assert not found.others
    assert {entry.path[0] for entry in found.tensors} == {"a", "b", "c"}
