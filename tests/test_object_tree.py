"""Objects of any shape are walked once, in order, in bounded time."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardkit.checkpoint import OtherKind
from shardkit.dtypes import U8
from shardkit.errors import LimitExceeded, Malformed
from shardkit.limits import Limits
from shardkit.object_tree import Found, collect
from shardkit.payload import Literal, Payload
from shardkit.stand_ins import Dict, Opaque
from shardkit.torch_tensors import Storage, StorageClass, View

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


def test_a_container_met_again_is_named_as_the_same() -> None:
    shared = table(w=TENSOR)
    found = walked(table(a=table(inner=shared), b=shared))
    assert [entry.path for entry in found.tensors] == [("a", "inner", "w")]
    assert [(other.path, other.reason) for other in found.others] == [(("b",), "the same object as 'a.inner'")]


def test_a_cycle_ends() -> None:
    root = table(w=TENSOR)
    root.put("self", [root])
    found = walked(root)
    assert [entry.name for entry in found.tensors] == ["w"]
    assert [(other.name, other.reason) for other in found.others] == [("self.0", "the same object as 'the root'")]


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
    assert len(found.tensors) == (11 if leaf is TENSOR else 1)


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
    found = walked(table(model=table(w=TENSOR, note=table(x=[1, 2])), optimizer=table(groups=[table(lr=1)])))
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
