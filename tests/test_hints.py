"""What an error advises: in the words of the place it is read in, at the end of a traceback, and
never twice.
"""

from __future__ import annotations

import ast
import copy
import pickle
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

import shardkit
from repository import ROOT
from shardkit import errors
from shardkit.cli import main
from shardkit.errors import (
    Incomplete,
    LimitExceeded,
    Malformed,
    Mismatch,
    OverBudget,
    PluginError,
    ReadOnly,
    ShardkitError,
    UnknownFormat,
    UnknownTensor,
)
from shardkit.hints import Hint, excluding, in_python, on_command_line, option, output, renaming

HINT: Hint = ("choose one with ", option("root", "ema"))
PATH = Path("big.bin")
ERRORS: dict[str, ShardkitError] = {
    "the root": ShardkitError("it is so", hint=HINT),
    "one without a hint": ShardkitError("it is so"),
    "UnknownFormat": UnknownFormat(PATH, "is a text", claimed=True, hint=HINT),
    "Malformed": Malformed(PATH, "is broken", where="header", hint=HINT),
    "LimitExceeded": LimitExceeded(PATH, "is large", limit="tensors", actual=5),
    "Mismatch": Mismatch(
        "they differ", missing=("a",), unexpected=("b",), wrong_shape={"c": ((1,), (2,))}, hint=HINT
    ),
    "Incomplete": Incomplete("2 files are missing", missing=("a", "b"), hint=HINT),
    "ReadOnly": ReadOnly("is an address", places=((PATH, 1, 2),), hint=HINT),
    "OverBudget": OverBudget("too little", needed=3, available=2, hint=HINT),
    "UnknownTensor": UnknownTensor("wieght", ["weight"]),
    "PluginError": PluginError("toy 1.0", "shardkit.formats:toy", "is broken", hint=HINT),
}
COPIES: dict[str, Callable[[ShardkitError], object]] = {
    "copied": copy.copy,
    "copied deeply": copy.deepcopy,
    "pickled": lambda error: pickle.loads(pickle.dumps(error)),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_of_an_error_says_the_same(
    error: ShardkitError, copied: Callable[[ShardkitError], object]
) -> None:
    twin = copied(error)
    assert type(twin) is type(error)
    assert isinstance(twin, ShardkitError)
    assert str(twin) == str(error)
    assert vars(twin) == vars(error)
    assert "".join(traceback.format_exception(twin)) == "".join(traceback.format_exception(error))


def test_every_class_of_the_tree_has_a_case_or_adds_nothing() -> None:
    cased = {type(error) for error in ERRORS.values()}
    tree = [
        each
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, ShardkitError)
    ]
    assert all(
        "__init__" not in vars(each) or each in cased or each is errors.FormatError for each in tree
    )


@pytest.mark.parametrize("error", [error for error in ERRORS.values() if error.hint], ids=str)
def test_a_traceback_ends_with_the_hint_once(error: ShardkitError) -> None:
    text = "".join(traceback.format_exception(error))
    assert text.endswith(f"hint: {error.hint}\n")
    assert text.count("hint: ") == 1


def test_an_uncaught_error_shows_its_hint() -> None:
    code = "import shardkit; shardkit.convert('nothing.bin', max_shard='2XB')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (
        "shardkit.errors.BadSize: '2XB' is not a size\nhint: write a number of bytes" in done.stderr
    )


def test_the_command_line_prints_a_hint_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gzipped.bin").write_bytes(b"\x1f\x8b" + bytes(30))
    assert main(["inspect", str(tmp_path / "gzipped.bin")]) == 1
    assert capsys.readouterr().err.count("gunzip") == 1


def test_a_hint_names_flags_on_the_command_line_and_arguments_in_python(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ROOT / "fixtures" / "good" / "safetensors-matrix.safetensors"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(shardkit.ShardkitError) as caught:
        shardkit.convert(source, tmp_path / "out")
    assert caught.value.hint == "choose another output with out=, or replace it with overwrite=True"
    assert main(["convert", str(source), "-o", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.endswith(
        "hint: choose another output with -o, or replace it with --overwrite\n"
    )


@pytest.mark.parametrize(
    ("hint", "flags", "arguments"),
    [
        ("plain", "plain", "plain"),
        (("with ", option("root")), "with --root", "with root="),
        (
            ("with ", option("max_shard", "2 GB")),
            "with --max-shard '2 GB'",
            "with max_shard='2 GB'",
        ),
        ((option("overwrite", True), "!"), "--overwrite!", "overwrite=True!"),
        ((output("a b"), " or ", output()), "-o 'a b' or -o", "out='a b' or out="),
        ((renaming("^a$", "b"),), "--rename '^a$=b'", "rename=[('^a$', 'b')]"),
        ((excluding(["a[0]", "b"]),), "--exclude 'a[[]0]' --exclude b", "exclude=['a[[]0]', 'b']"),
        (
            (excluding([f"{n}" for n in range(9)], most=2),),
            "--exclude 0 --exclude 1 …",
            "exclude=['0', '1'] …",
        ),
    ],
    ids=str,
)
def test_an_option_is_worded_for_both(hint: Hint, flags: str, arguments: str) -> None:
    assert on_command_line(hint) == flags
    assert in_python(hint) == arguments


@pytest.mark.parametrize("name", ["it's", 'a"b', "a b", "ü", "$HOME", "a\\b"])
def test_an_option_can_be_pasted(name: str) -> None:
    found = option("root", name)
    assert shlex.split(found.flag) == ["--root", name]
    assert ast.literal_eval(found.argument.partition("=")[2]) == name


def test_a_foreign_name_in_a_hint_obeys_no_terminal() -> None:
    error = ShardkitError("x", hint=("take ", option("root", "a\x1b[31m\u202eb")))
    assert error.hint is not None
    assert error.command_hint is not None
    assert error.hint.isprintable()
    assert error.command_hint.isprintable()


ADVISED_BY_DEFAULT = ("Malformed", "LimitExceeded", "UnknownTensor")
TREE = {
    name
    for name, each in vars(errors).items()
    if isinstance(each, type) and issubclass(each, ShardkitError)
}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "shardkit").rglob("*.py")), ids=lambda path: path.stem
)
def test_no_error_ends_in_nothing_to_do(path: Path) -> None:
    calls = (
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    )
    made = [
        call
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id in TREE - set(ADVISED_BY_DEFAULT)
    ]
    assert not [
        call.lineno for call in made if not any(keyword.arg == "hint" for keyword in call.keywords)
    ]


def _hints(path: Path) -> list[tuple[int, str]]:
    """Every text of *path* that is the value of a hint or is called one, with its line."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    values = [node.value for node in nodes if isinstance(node, ast.keyword) and node.arg == "hint"]
    values += [
        node.value
        for node in nodes
        if isinstance(node, ast.Assign) and "hint" in ast.unparse(node.targets[0]).lower()
    ]
    texts = (text for value in values for text in ast.walk(value) if isinstance(text, ast.Constant))
    return [(text.lineno, text.value) for text in texts if isinstance(text.value, str)]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "shardkit").rglob("*.py")), ids=lambda path: path.stem
)
def test_no_hint_spells_out_a_flag(path: Path) -> None:
    """Outside of a whole command, which stands in backquotes, an option is an `Option`."""
    outside = [(line, text.split("`")[::2]) for line, text in _hints(path)]
    assert not [
        (line, part)
        for line, parts in outside
        for part in parts
        if " --" in f" {part}" or " -o" in f" {part}"
    ]
