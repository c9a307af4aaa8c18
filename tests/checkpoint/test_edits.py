import re
import shlex
from typing import Any

import pytest

from shardkit.checkpoint.edits import Edits, edit
from shardkit.checkpoint.entries import Checkpoint, Other, OtherKind, TensorEntry
from shardkit.dtypes import BY_CODE
from shardkit.errors import NameClash, NothingSelected, PlanError, Unwritable
from shardkit.payloads.cast import Cast
from shardkit.payloads.payload import Literal

F32, BF16 = BY_CODE["F32"], BY_CODE["BF16"]


def tensor(name: str, content: bytes | None = None, code: str = "F32") -> TensorEntry:
    dtype = BY_CODE[code]
    content = name.encode().ljust(8) if content is None else content
    return TensorEntry((name,), dtype, (len(content) // dtype.itemsize,), Literal(content))


WEIGHTS = Checkpoint(
    (
        tensor("embed.w", b"12345678"),
        tensor("layers.0.w"[:8]),
        tensor("head.w", b"12345678"),
        tensor("n", code="I64"),
    )
)


def names(edits: Edits, checkpoint: Checkpoint = WEIGHTS) -> list[str]:
    return [entry.name for entry in edit(checkpoint, edits).entries]


def test_by_default_nothing_changes_but_ties_are_folded() -> None:
    edited = edit(WEIGHTS, Edits())
    assert [entry.name for entry in edited.entries] == ["embed.w", "layers.0", "n"]
    assert edited.aliases == {"head.w": "embed.w"}


def test_ties_may_be_copied() -> None:
    edited = edit(WEIGHTS, Edits(ties="copy"))
    assert edited.entries == WEIGHTS.tensors
    assert edited.aliases == {}


@pytest.mark.parametrize("reserved", ["format", "origin"])
def test_a_tie_whose_name_means_something_else_in_metadata_is_copied(reserved: str) -> None:
    checkpoint = Checkpoint(
        (tensor("a", bytes(8)), tensor(reserved, bytes(8))), metadata={"origin": "here"}
    )
    edited = edit(checkpoint, Edits())
    assert [entry.name for entry in edited.entries] == ["a", reserved]
    assert edited.aliases == {}


def test_empty_tensors_are_never_tied() -> None:
    assert names(Edits(), Checkpoint((tensor("a", b""), tensor("b", b"")))) == ["a", "b"]


def test_equal_bytes_of_other_shape_or_type_are_no_tie() -> None:
    content = bytes(8)
    turned = TensorEntry(("b",), F32, (1, 2), Literal(content))
    assert names(
        Edits(), Checkpoint((tensor("a", content), turned, tensor("c", content, "I64")))
    ) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        (Edits(include=("layers.*",)), ["layers.0"]),
        (Edits(include=("*.w",), exclude=("layers*",)), ["embed.w"]),
        (Edits(exclude=("embed.w",)), ["layers.0", "head.w", "n"]),
        (Edits(rename=((r"^layers\.(\d+)", r"h.\1.w"), ("h", "g"))), ["embed.w", "g.0.w", "n"]),
    ],
)
def test_names_are_chosen_and_changed(edits: Edits, expected: list[str]) -> None:
    assert names(edits) == expected


def test_globs_are_of_the_names_before_they_are_changed() -> None:
    assert names(Edits(include=("layers*",), rename=(("layers", "h"),))) == ["h.0"]


def test_a_type_is_given_to_floats_only() -> None:
    entries = edit(WEIGHTS, Edits(dtype=BF16)).entries
    assert [entry.dtype.code for entry in entries] == ["BF16", "BF16", "I64"]
    assert entries[0].payload == Cast(WEIGHTS.tensors[0].payload, F32, BF16)


def test_what_has_the_type_already_is_left_alone() -> None:
    edited = edit(WEIGHTS, Edits(dtype=F32))
    assert edited.cast == 0
    assert edited.entries[0] is WEIGHTS.tensors[0]


def test_quantised_floats_keep_their_type_and_it_is_said() -> None:
    edited = edit(Checkpoint((tensor("a", code="F8_E4M3"), tensor("b"))), Edits(dtype=BF16))
    assert [entry.dtype.code for entry in edited.entries] == ["F8_E4M3", "BF16"]
    assert "8-bit or narrower floats" in edited.notes[0]


def test_two_tensors_of_one_name_are_a_clash_that_names_both() -> None:
    checkpoint = Checkpoint((tensor("a.b"), TensorEntry(("a", "b"), F32, (1,), Literal(bytes(4)))))
    with pytest.raises(
        NameClash, match=re.escape("two tensors would be called 'a.b': 'a.b', and 'a' → 'b'")
    ) as caught:
        edit(checkpoint, Edits(root="."))
    assert (
        caught.value.hint == "select one of the subtrees with root=, or exclude both with exclude="
    )
    assert (
        caught.value.command_hint
        == "select one of the subtrees with --root, or exclude both with --exclude"
    )
    assert names(Edits(root="a"), checkpoint) == ["b"]


def test_a_rename_that_joins_two_names_is_a_clash() -> None:
    with pytest.raises(NameClash) as caught:
        edit(WEIGHTS, Edits(rename=((".*w", "w"),)))
    assert str(caught.value) == "rename gives 'embed.w' and 'head.w' the same name, 'w'"
    assert (
        caught.value.command_hint
        == "change --rename so that names stay unique, or leave one of them out with --exclude"
    )


ASKED: dict[str, Any] = {
    "root": None,
    "include": (),
    "exclude": (),
    "rename": (),
    "dtype": None,
    "ties": "keep-first",
}


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_glob_that_stands_alone_is_one(option: str) -> None:
    assert Edits.asked(**{**ASKED, option: "layers.*"}) == Edits.asked(
        **{**ASKED, option: ["layers.*"]}
    )


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"ties": "keep"}, "ties is 'keep'; expected one of 'keep-first', 'copy'"),
        ({"rename": ["^w=weight"]}, "a rename is '^w=weight'; expected a pair"),
        ({"rename": ("ab", "cd")}, "a rename is 'ab'; expected a pair"),
        ({"rename": [("w",)]}, "a rename is a tuple of 1; expected a pair"),
        ({"dtype": "int8"}, "'int8' is not a floating-point type"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_at_once(asked: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PlanError, match=re.escape(sentence)):
        Edits.asked(**{**ASKED, **asked})


def test_a_broken_expression_is_a_sentence() -> None:
    with pytest.raises(PlanError, match=r"cannot rename '\(' to 'x': missing \)"):
        edit(WEIGHTS, Edits(rename=(("(", "x"),)))


def test_an_undense_weight_is_refused_by_name_and_may_be_excluded() -> None:
    checkpoint = Checkpoint(
        (tensor("a"),), (Other(("s",), OtherKind.SPARSE, 8, "torch.sparse_coo"),)
    )
    with pytest.raises(
        Unwritable, match=re.escape("'s' (sparse tensor: torch.sparse_coo)")
    ) as caught:
        edit(checkpoint, Edits())
    assert caught.value.hint == "leave them out: exclude=['s']"
    assert caught.value.command_hint == "leave them out: --exclude s"
    assert names(Edits(exclude=("s",)), checkpoint) == ["a"]


def test_the_hint_leaves_out_all_that_is_undense_and_nothing_else() -> None:
    odd = ("s", "s[0]", "it's", "s 2")
    others = tuple(Other((name,), OtherKind.SPARSE, 8, "torch.sparse_coo") for name in odd)
    checkpoint = Checkpoint((tensor("s0"), tensor("it_s")), others)
    with pytest.raises(Unwritable) as caught:
        edit(checkpoint, Edits())
    globs = [
        word
        for word in shlex.split(str(caught.value.command_hint))
        if word not in ("leave", "them", "out:", "--exclude")
    ]
    assert names(Edits(exclude=tuple(globs)), checkpoint) == ["s0", "it_s"]


@pytest.mark.parametrize(
    ("checkpoint", "edits", "reason"),
    [
        (Checkpoint(()), Edits(), "the source: it holds no tensors"),
        (WEIGHTS, Edits(exclude=("*",)), "leave none of the 4 tensors"),
    ],
)
def test_selecting_nothing_says_why(checkpoint: Checkpoint, edits: Edits, reason: str) -> None:
    with pytest.raises(NothingSelected, match=reason):
        edit(checkpoint, edits)


def test_what_is_excluded_and_not_there_is_noted() -> None:
    edited = edit(WEIGHTS, Edits(exclude=("layers*", "*.num_batches_tracked")))
    assert [entry.name for entry in edited.entries] == ["embed.w", "n"]
    (note,) = edited.notes
    assert note.startswith(
        "exclude '*.num_batches_tracked' matches none of the 4 names, as in 'embed.w', "
    )
