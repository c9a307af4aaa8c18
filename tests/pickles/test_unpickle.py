"""The pickle machine reads what Python writes, runs nothing, and is bounded in time and memory."""

from __future__ import annotations

import pickle
import pickletools
import struct
import sys
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.errors import LimitExceeded, Malformed, ShardkitError
from shardkit.limits import Limits
from shardkit.payloads.payload import Literal
from shardkit.pickles.objects import Builder, Dict, Global, LongString, Opaque, Vocabulary
from shardkit.pickles.opcodes import OPCODES
from shardkit.pickles.torch_globals import find
from shardkit.pickles.unpickle import Pickle, unpickle

PATH = Path("data.pkl")


def read(content: bytes, limits: Limits | None = None, start: int = 0) -> Pickle:
    return unpickle(
        PATH,
        Literal(content),
        Vocabulary(find, lambda pid: ("pid", pid)),
        limits=limits or Limits(),
        start=start,
    )


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(0, 9) | st.binary(), inner)
    ),
    max_leaves=30,
)


@settings(max_examples=400, deadline=None)
@given(plain, st.integers(2, 5))
def test_plain_values_come_back(value: object, protocol: int) -> None:
    content = pickle.dumps(value, protocol)
    found = read(b"before" + content + b"after", start=6)
    assert found.value == value
    assert found.stop == 6 + len(content)
    assert found.calls == ()


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_is_known(protocol: int) -> None:
    value = {
        "a": [1, -2, 300, 1 << 40, -(1 << 90), 1.5, True, False, None],
        "b": ("é\n", (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
    }
    assert read(pickle.dumps(value, protocol)).value == value


def test_every_opcode_of_python_has_a_meaning() -> None:
    unknown = OPCODES[0xFF]
    in_the_loop = {"LONG_BINPUT", "BINGET", "BININT1", "MARK", "TUPLE1", "TUPLE"}
    missing = {op.name for op in pickletools.opcodes if OPCODES[ord(op.code)] is unknown}
    assert missing == in_the_loop


def test_strings_of_python_2_are_text_if_they_can_be() -> None:
    assert read(b"\x80\x02U\x03abc.").value == "abc"
    assert read(b"\x80\x02U\x02\xff\xfe.").value == b"\xff\xfe"
    assert read(b"T\x03\0\0\0abc.").value == "abc"
    assert read(b"S'a\\x41\\n\\'\\\\'\n.").value == "aA\n'\\"


def test_pickles_that_follow_each_other_are_read_one_by_one() -> None:
    content = b"".join(pickle.dumps(value, 2) for value in (1, "two", [3]))
    at, values = 0, []
    while at < len(content):
        found = read(content, start=at)
        values.append(found.value)
        at = found.stop
    assert values == [1, "two", [3]]


def test_long_strings_are_left_where_they_are() -> None:
    blob = bytes(range(256)) * 4000
    for protocol in (3, 4, 5):
        content = pickle.dumps([blob, "x" * 5000, b"short", 7], protocol)
        value = read(content).value
        assert isinstance(value, list)
        long, text, short, seven = value
        assert isinstance(long, LongString)
        assert content[long.start : long.start + long.nbytes] == blob
        assert isinstance(text, LongString)
        assert (short, seven) == (b"short", 7)


def test_a_large_pickle_is_read_in_little_memory() -> None:
    content = Literal(pickle.dumps([bytes(50_000_000), 1], 4))
    tracemalloc.start()
    unpickle(PATH, content, Vocabulary(find, id), limits=Limits())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


class Odd:
    """Of every way to be pickled that a class has."""

    def __init__(self) -> None:
        self.x = 1


@pytest.mark.parametrize("protocol", range(6))
def test_unknown_objects_are_stand_ins_with_their_state(protocol: int) -> None:
    found = read(pickle.dumps(Odd(), protocol))
    assert isinstance(found.value, Opaque)
    assert found.value.states == [{"x": 1}]
    assert len(found.calls) == 1


def test_known_collections_are_read() -> None:
    value = OrderedDict(a={1, 2}, b=frozenset({3}))
    for protocol in (2, 4):
        found = read(pickle.dumps(value, protocol))
        assert isinstance(found.value, Dict)
        assert [inner.items for inner in found.value.values() if isinstance(inner, Opaque)] == [
            [1, 2],
            [3],
        ]
        assert found.calls == ()
    python2 = b"\x80\x02ccollections\nOrderedDict\n]](U\x01aK\x01ea\x85R."
    assert read(python2).value == {"a": 1}


def test_a_call_is_listed_and_not_run(tmp_path: Path) -> None:
    target = tmp_path / "boom"
    content = b"cos\nsystem\n(S'touch " + str(target).encode() + b"'\ntR."
    found = read(content)
    assert isinstance(found.value, Opaque)
    assert found.calls == ("os.system",)
    assert not target.exists()
    for other in (
        b"(S'x'\nios\nsystem\n.",
        b"(cos\nsystem\nS'x'\no.",
        b"cos\nsystem\n)\x81.",
        b"cos\nsystem\n)}\x92.",
        b"\x82\x07)R.",
    ):
        assert len(read(other).calls) == 1


def test_persistent_ids_are_told() -> None:
    assert read(b"K\x07Q.").value == ("pid", 7)
    assert read(b"Pname\n.").value == ("pid", "name")


# What strangers write.


def test_a_memo_index_of_two_billion_costs_nothing() -> None:
    content = b"]r\xff\xff\xff\xff0j\xff\xff\xff\xff."
    tracemalloc.start()
    assert read(content).value == []
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    "content",
    [
        b"]" * 100_000 + b"a" * 99_999 + b".",
        b"(" * 100_000 + b"l" * 100_000 + b".",
        b"K\1" + b"\x85" * 100_000 + b".",
    ],
    ids=["lists", "marks", "tuples"],
)
def test_a_hundred_thousand_levels_are_read_and_let_go(content: bytes) -> None:
    assert read(content).value is not None


def laughs(levels: int) -> bytes:
    """A tuple of ten tuples of ten …, each made once."""
    return b"K\1" + b"".join(b"q\0" + b"0" + b"(" + b"h\0" * 10 + b"t" for _ in range(levels))


@pytest.mark.timeout(60)  # to go them all would take for ever
@pytest.mark.parametrize(
    "content",
    [
        laughs(100) + b".",
        b"}" + laughs(100) + b"K\1s.",
        b"}" + laughs(100) + b"NsK\1K\2s.",
        b"\x8f(" + laughs(100) + b"\x90.",
        b"(" + laughs(100) + b"\x91.",
        b"cos\nsystem\n" + laughs(100) + b"R.",
        laughs(100) + b")R.",
    ],
    ids=["value", "key", "key beside others", "in a set", "in a frozen set", "arguments", "called"],
)
def test_a_structure_with_more_paths_than_atoms_takes_no_time(content: bytes) -> None:
    read(content)


@pytest.mark.timeout(60)  # a dict of those would take minutes
@pytest.mark.parametrize(
    ("begin", "value", "end"),
    [(b"}(", b"N", b"u."), (b"\x8f(", b"", b"\x90.")],
    ids=["dict", "set"],
)
def test_keys_that_were_chosen_to_have_one_hash_take_no_time(
    begin: bytes, value: bytes, end: bytes
) -> None:
    keys = [number * sys.hash_info.modulus for number in range(1, 100_001)]
    assert len({hash(key) for key in keys}) == 1
    read(begin + b"".join(b"\x8a\x0b" + key.to_bytes(11, "little") + value for key in keys) + end)


@pytest.mark.timeout(60)  # likewise
@pytest.mark.parametrize(
    "content",
    [
        laughs(100) + b"K\1a.",
        laughs(100) + b"K\1K\2s.",
        laughs(100) + laughs(100) + b"\x93.",
        b"ctorch._utils\n_rebuild_tensor_v2\n" + laughs(100) + b"R.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + laughs(100) + b"h\0h\0h\0tR.",
    ],
    ids=["append", "set item", "global", "rebuild", "rebuild arguments"],
)
def test_neither_does_a_message_about_one(content: bytes) -> None:
    with pytest.raises(Malformed):
        read(content)


FAULTS = {
    "empty": (b"", "ends before it is complete"),
    "no stop": (b"\x80\x02]", "ends before it is complete"),
    "nothing to stop with": (b"\x80\x02.", "nothing on its stack"),
    "argument cut": (b"\x80\x02J\1\2", "ends before it is complete"),
    "text cut": (b"X\xff\0\0\0abc", "ends before it is complete"),
    "long text cut": (b"X\xff\xff\xff\x7fabc", "runs over the end"),
    "frame too long": (b"\x80\x04\x95" + struct.pack("<Q", 1 << 62), "runs over the end"),
    "line without end": (b"c" + b"x" * 10_000, "does not end"),
    "unknown opcode": (b"\xfe", "0xfe is not an opcode"),
    "future protocol": (b"\x80\x06N.", "protocol 6"),
    "memo never stored": (b"h\7.", "never stored"),
    "pop of nothing": (b"0.", "empty stack"),
    "mark missing": (b"t.", "empty stack"),
    "memo of nothing": (b"q\0.", "empty stack"),
    "append to a text": (b"X\1\0\0\0aK\1a.", "appends to 'a'"),
    "item of a list": (b"]K\1K\2s.", "sets an item of a list of 0"),
    "odd items": (b"}(K\1u.", "without a value"),
    "set of a number": (b"K\1(K\1\x90.", "appends to 1"),
    "no number": (b"Ixyz\n.", "bytes 'xyz' is not a number"),
    "global of numbers": (b"K\1K\2\x93.", "names a class by 1 and 2"),
    "out of band": (b"\x97.", "out-of-band"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_pickle_is_refused_with_the_byte(fault: str) -> None:
    content, sentence = FAULTS[fault]
    with pytest.raises(Malformed, match=rf"byte [\d,]+: .*{sentence}"):
        read(content)


def test_a_pickle_cut_anywhere_is_refused() -> None:
    value = {"a": [1.5, (1, 2, 3), "text" * 100, bytes(300), 1 << 200, {"x": None}], "b": Odd()}
    for protocol in range(6):
        content = pickle.dumps(value, protocol)
        for stop in range(len(content)):
            with pytest.raises(Malformed):
                read(content[:stop])


@settings(max_examples=3000, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_value_or_our_error(content: bytes) -> None:
    try:
        read(content, Limits(pickle_ops=1000))
    except ShardkitError:
        return


@pytest.mark.parametrize(
    "unit",
    [b"]", b"(", b"N", b"]\x94", b"}", b")\x85"],
    ids=["lists", "marks", "nones", "memo", "dicts", "tuples"],
)
def test_a_pickle_that_makes_us_hold_too_much_hits_the_limit(unit: bytes) -> None:
    with pytest.raises(LimitExceeded) as caught:
        read(unit * 2_000_000, Limits(held_bytes=5_000_000))
    assert caught.value.limit == "held_bytes"


def test_a_pickle_of_too_many_operations_hits_the_limit() -> None:
    with pytest.raises(LimitExceeded) as caught:
        read(b"N0" * 1000, Limits(pickle_ops=100))
    assert caught.value.limit == "pickle_ops"


def test_globals_are_known_by_full_name_only() -> None:
    assert isinstance(find("torch._utils", "_rebuild_tensor_v2"), Builder)
    assert find("evil", "_rebuild_tensor_v2") == Global("evil._rebuild_tensor_v2")
    assert find("evil", "FloatStorage") == Global("evil.FloatStorage")
