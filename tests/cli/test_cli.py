"""The command line as a whole: exit codes, streams, signals, and sentences instead of
tracebacks.
"""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from repository import ROOT
from shardkit.cli import main
from shardkit.cli.options import split_rename
from shardkit.errors import PluginError
from shardkit.sources import registry
from shardkit.sources.format import Format

GOOD = ROOT / "fixtures" / "good"
HOSTILE = ROOT / "fixtures" / "hostile"
TRAINING = GOOD / "zip-training.pt"
posix = pytest.mark.skipif(os.name == "nt", reason="signals and pipes as POSIX has them")

# The command line, stopped by the signal in its first argument when it is about to write.
STOPPED = """
import os, signal, sys
from shardkit.cli import main
from shardkit.system.progress import Progress
signal.signal(signal.SIGINT, signal.default_int_handler)
numbers = [int(sys.argv.pop(1))]
def add(self, nbytes):
    while numbers:  # once, whichever thread is first
        try:
            number = numbers.pop()
        except IndexError:
            return
        os.kill(os.getpid(), number)
Progress.add = add
sys.exit(main())
"""


def python(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {
        name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"
    } | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(  # type: ignore[call-overload, no-any-return] # the options of subprocess.run
        command, env=environment, text=True, capture_output=True, **options
    )


def test_help_is_for_people_and_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    for command in ("convert", "offload-prep", "inspect", "verify", "diff", "formats"):
        assert f"\n  {command} " in capsys.readouterr().out or main([command, "--help"]) == 0


@pytest.mark.parametrize(
    "command", ["convert", "offload-prep", "inspect", "verify", "diff", "formats"]
)
def test_the_help_of_each_command_has_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    assert f"\n    shardkit {command}" in capsys.readouterr().out


def test_help_loads_no_command(tmp_path: Path) -> None:
    code = (
        "import sys; from shardkit.cli import main; main(['--help']); print(*sorted(sys.modules))"
    )
    loaded = set(python("-c", code).stdout.splitlines()[-1].split())
    assert "shardkit.cli.group" in loaded
    assert not loaded & {
        "shardkit.cli.commands.convert",
        "shardkit.cli.commands.inspect",
        "shardkit.sources.registry",
        "torch",
        "numpy",
        "zstandard",
    }


def test_the_version_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("shardkit 0.")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["conver", "x"], "there is no command 'conver'; did you mean convert?"),
        ([str(TRAINING)], "is a file; a command must come first, as in: shardkit inspect"),
        (["convert"], "Missing argument 'SRC'"),
        (["convert", "x", "--maxshard", "1"], "--max-shard"),
        (["convert", "x", "--max-shard", "3QB"], "'3QB' is not a size; write a number of bytes"),
        (["convert", "x", "--dtype", "int8"], "'int8' is not a floating-point type"),
        (["convert", "x", "--rename", "a"], "'a' must be REGEX=REPL"),
        (["convert", "x", "--rename", "=a"], "'=a' must be REGEX=REPL"),
        (["convert", "x", "--limit", "speed=3"], "and NAME one of header_bytes, tensors"),
        (["convert", "x", "--limit", "tensors=few"], "'few' is not a size"),
        (
            ["convert", "x", "-o", "y.safetensors", "--max-shard", "1GB"],
            "-o y.safetensors is one file, which has no shards",
        ),
        (["verify", "x", "--root", "model"], "name it with --against"),
        (["verify", "x", "--ties", "copy"], "name it with --against"),
        (["inspect", "x", "--all", "--json"], "--all has no effect with --json"),
        (["convert", "x", "--quiet", "--json"], "--quiet has no effect with --json"),
        (["diff", "x", "y", "-q", "-v"], "--quiet and --verbose exclude each other"),
        (["place", "x", "--tokens", "4"], "--tokens has no effect without --predict"),
        (
            ["place", "x", "--tokens", "4", "--rates", "compute=1GB"],
            "--tokens has no effect without --predict",
        ),
        (
            ["place", "x", "--tokens", "4", "--predict", "--rates", "compute=1GB"],
            "--tokens has no effect: --rates gives the compute throughput",
        ),
        (
            ["place", "x", "--predict", "--rates", "disk=1GB,copy=1GB,link=1GB,compute=1GB"],
            "--predict has no effect",
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_command_line_that_is_not_understood_exits_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert sentence in shown.err
    assert shown.err.startswith("shardkit: ")
    assert "\nhint: see shardkit" in shown.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", HOSTILE / "gguf.bin"],
        ["convert", HOSTILE / "lfs-pointer.bin"],
        ["inspect", "/nowhere/at/all.bin"],
        ["inspect", HOSTILE / "folder-named-x.bin"],
        ["convert", TRAINING, "-o", TRAINING],
        ["convert", TRAINING, "--root", "nowhere"],
        ["convert", TRAINING, "--format", "nothing"],
    ],
    ids=lambda arguments: " ".join(map(str, arguments)).replace(str(ROOT), ""),
)
def test_what_cannot_be_done_is_one_sentence_and_exit_1(
    arguments: list[str | Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(each) for each in arguments]) == 1
    is_one_sentence(capsys)


# As of cmp and diff: 0 the same, 1 different, 2 trouble.
COMPARED = [
    (["verify", TRAINING], 0),
    (
        [
            "verify",
            GOOD / "safetensors-tied.safetensors",
            "--against",
            GOOD / "safetensors-tied.safetensors",
        ],
        0,
    ),
    (["verify", GOOD / "zip-module.pt", "--against", TRAINING], 1),
    (["verify", HOSTILE / "zero-bytes.bin"], 2),
    (["verify", TRAINING, "--against", "nowhere"], 2),
    (["verify", TRAINING, "--against", TRAINING, "--root", "nowhere"], 2),
    (["verify", TRAINING, "--quite"], 2),
    (["verify", "s3://b/x"], 2),
    (["diff", TRAINING, GOOD / "legacy-training.pt"], 0),
    (["diff", TRAINING, GOOD / "zip-module.pt"], 1),
    (["diff", TRAINING, HOSTILE / "html.bin"], 2),
    (["diff", "nowhere", TRAINING], 2),
    (["diff", TRAINING], 2),
]


@pytest.mark.parametrize("how", [[], ["--json"], ["-q"]], ids=" ".join)
@pytest.mark.parametrize(
    ("arguments", "code"),
    COMPARED,
    ids=lambda each: (
        " ".join(map(str, each)).replace(str(ROOT), "") if isinstance(each, list) else ""
    ),
)
def test_the_exit_codes_of_verify_and_diff_are_those_of_cmp(
    arguments: list[str | Path],
    code: int,
    how: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*map(str, arguments), *how]) == code
    if code == 2:
        is_one_sentence(capsys)


def test_damage_is_exit_1(tmp_path: Path) -> None:
    assert (
        main(["convert", str(TRAINING), "-o", str(tmp_path / "out"), "--checksum", "sha256"]) == 0
    )
    shard = tmp_path / "out" / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main(["verify", str(tmp_path / "out")]) == 1


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (cut, "are there; the first incomplete one is"),
    "emptied": (lambda file: file.write_bytes(b""), "is empty"),
    "missing": (Path.unlink, "that it lists is missing"),
}


@pytest.mark.parametrize("against", [False, True], ids=["alone", "against"])
@pytest.mark.parametrize("how", DAMAGES)
def test_a_shard_that_is_damaged_or_missing_is_named_and_is_exit_1(
    how: str, against: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(TRAINING), "-o", str(out), "--max-shard", "400B", "-q"]) == 0
    shard = max(out.glob("*.safetensors"))
    damage, what = DAMAGES[how]
    damage(shard)
    arguments = ["verify", str(out), *(["--against", str(TRAINING)] if against else [])]
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert shard.name in shown.out
    assert what in shown.out
    assert shown.out.endswith("out/ is damaged in 1 place\n")
    assert "nothing else was compared" in shown.err
    assert main([*arguments, "--json"]) == 1
    (difference,) = json.loads(capsys.readouterr().out)["differences"]
    assert (out / difference["name"]).name in (shard.name, "model.safetensors.index.json")
    # Where it is the source that is damaged, nothing is known of the output.
    assert main(["verify", str(TRAINING), "--against", str(out)]) == 2


def is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    shown = capsys.readouterr()
    assert shown.out == ""
    first, *rest = shown.err.splitlines()
    assert first.startswith("shardkit: ")
    assert len(rest) <= 1
    assert all(line.startswith("hint: ") for line in rest)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["convert", "--include", "*.weight", "--include", "wieght"],
            "include 'wieght' matches none of the 7 names, as in '0.weight'",
        ),
        (
            ["convert", "--rename", "^module\\.="],
            "rename '^module\\.' matches none of the 7 names, as in '0.weight'",
        ),
        (["convert", "--rename", "^0=a", "--rename", "^0=b"], "rename '^0' matches none"),
        (["offload-prep", "--blocks", "layers"], "'layers' matches no module name"),
        (["place", "--no-split", "layers"], "'layers' matches no module name"),
        pytest.param(
            ["place", "--max-memory", "cpu=1GB", "--rates", "disk=1GB,link=1GB"],
            "the rates given (disk, link) have no effect: nothing is read",
            marks=pytest.mark.torch,
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_without_effect_is_an_error_that_names_names(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([arguments[0], str(TRAINING), *arguments[1:]]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert sentence in shown.err
    assert "\nhint: " in shown.err
    assert not list(tmp_path.iterdir())


@pytest.mark.torch
def test_some_rates_may_be_without_effect_and_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["place", str(TRAINING), "--max-memory", "cpu=1GB", "--rates", "disk=1GB,compute=1GB"])
        == 0
    )
    assert "no forward depends on disk: nothing is read from disk" in capsys.readouterr().out


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "formats", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["formats"])


@posix
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
)
def test_a_stopped_run_says_how_to_go_on_and_goes_on(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    arguments = ["convert", str(TRAINING), "-o", "out", "--max-shard", "3kB"]
    done = python("-c", STOPPED, str(int(number)), *arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    (line,) = done.stderr.splitlines()
    assert "out.partial" in line
    assert "the same command resumes from there" in line
    assert python("-m", "shardkit", *arguments, cwd=tmp_path).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@posix
@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", GOOD / "zip-matrix.pt"],
        ["inspect", GOOD / "zip-matrix.pt", "--json"],
        ["formats"],
    ],
)
def test_a_closed_pipe_is_silent(arguments: list[str | Path]) -> None:
    read, write = os.pipe()
    os.close(read)
    environment = {
        name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"
    } | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "shardkit", *arguments]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environment)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


PRINTED: list[list[str | Path]] = [
    [],
    ["--help"],
    ["--version"],
    ["convert", "--help"],
    ["formats"],
    ["inspect", TRAINING],
    ["inspect", TRAINING, "--json"],
    ["place", TRAINING],
    ["convert", TRAINING, "-o", "nowhere", "--dry-run"],
    ["verify", GOOD / "zip-matrix.pt"],
    ["diff", TRAINING, TRAINING],
]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(
    "arguments", PRINTED, ids=lambda arguments: " ".join(map(str, arguments)).replace(str(ROOT), "")
)
def test_a_full_disk_behind_stdout_is_a_sentence(arguments: list[str | Path]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "shardkit", *arguments]
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
    assert done.returncode == (2 if arguments and arguments[0] in ("verify", "diff") else 1)
    sentence = "shardkit: standard output cannot be written: No space left on device"
    assert done.stderr.decode().splitlines()[-2:] == [
        sentence,
        "hint: free some space, or send it elsewhere",
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["formats"], 0), (["inspect", "nowhere"], 1), (["verify", "nowhere"], 2)],
)
def test_a_full_disk_behind_stderr_stops_no_work(arguments: list[str], code: int) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "shardkit", *arguments, "-v"]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=full, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
    assert (done.returncode, bool(done.stdout)) == (code, code == 0)


class Broken(io.StringIO):
    """A stdout whose other end is gone in some way."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def write(self, text: str) -> int:
        raise OSError(self._number, os.strerror(self._number))


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EIO, 1), (errno.ENOSPC, 1), (errno.EDQUOT, 1), (errno.EBADF, 1), (errno.EPIPE, 141)],
)
@pytest.mark.parametrize(
    "arguments",
    PRINTED[:6],
    ids=lambda arguments: " ".join(map(str, arguments)).replace(str(ROOT), ""),
)
def test_whatever_stdout_fails_with_is_no_traceback(
    arguments: list[str | Path],
    number: int,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdout", Broken(number))
    assert main([*map(str, arguments)]) == code
    assert capsys.readouterr().err.startswith(
        "shardkit: standard output cannot be written: " if code == 1 else ""
    )


@posix
def test_a_closed_stdout_is_a_sentence_and_a_closed_stderr_no_harm() -> None:
    def run(closed: str) -> subprocess.CompletedProcess[str]:
        return python(
            "-c",
            (
                f"import os, sys; os.close({closed}); os.execv(sys.executable, [sys.executable, "
                "*sys.argv[1:]])"
            ),
            *command,
        )

    command = ["-m", "shardkit", "formats"]
    said = "shardkit: standard output is closed\nhint: leave it open, or send it to a file\n"
    assert (run("1").returncode, run("1").stderr) == (1, said)
    assert (run("2").returncode, run("2").stdout[:4]) == (0, "NAME")


@pytest.mark.parametrize("name", ["a\x1b[31m.pt", "a\nb.pt", "caf\udce9.pt"], ids=ascii)
def test_no_control_character_of_a_file_name_reaches_the_terminal(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        Path(name).write_bytes(TRAINING.read_bytes())
    except (OSError, UnicodeError):
        pytest.skip("this file system has no such names")
    assert main(["inspect", name]) == 0
    assert main(["convert", name]) == 0
    assert main(["convert", name]) == 1
    assert main([name]) == 2
    shown = capsys.readouterr()
    assert (shown.out + shown.err).replace("\n", "").isprintable()


def test_an_encoding_without_the_character_is_no_crash() -> None:
    command = [sys.executable, "-m", "shardkit", "inspect", str(GOOD / "zip-others.pt")]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_missing_click_has_a_sentence(tmp_path: Path) -> None:
    run = "import sys; sys.modules['click'] = None; from shardkit.cli import main; sys.exit(main())"
    done = python("-c", run, "convert", TRAINING, "-o", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith("hint: pip install click\n")


@pytest.mark.parametrize(
    ("word", "pattern", "replacement"),
    [
        ("a=b", "a", "b"),
        ("^module\\.=", "^module\\.", ""),
        ("(?=x)y=z", "(?=x)y", "z"),
        ("(?<=a)b=c", "(?<=a)b", "c"),
        ("[=]=eq", "[=]", "eq"),
        ("a\\=b=c", "a\\=b", "c"),
        ("a=b=c", "a", "b=c"),
    ],
)
def test_a_rename_is_split_after_a_whole_regular_expression(
    word: str, pattern: str, replacement: str
) -> None:
    assert split_rename(word) == (pattern, replacement)


def test_formats_are_listed_for_people_and_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats"]) == 0
    table = capsys.readouterr().out
    assert main(["formats", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    safetensors = next(each for each in document["formats"] if each["name"] == "safetensors")
    assert safetensors["can"] == ["read", "write"]
    assert safetensors["suffixes"] == [".safetensors"]
    for each in (*document["formats"], *document["codecs"]):
        assert each["error"] is None
        assert f"\n{each['name']} " in table


def test_a_broken_plugin_is_listed_with_its_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = PluginError(
        "frobs 1.2",
        "shardkit.formats:frob",
        "cannot be loaded: no\x1b[31m",
        hint="update or remove frobs",
    )
    broken: registry.Loaded[Format] = registry.Loaded(
        EntryPoint("frob", "frobs:FORMAT", registry.FORMATS), error=error
    )
    formats = (*registry.formats(), broken)
    monkeypatch.setattr(registry, "formats", lambda: formats)
    assert main(["formats"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert (
        line
        == f"cannot be used: {str(error).replace(chr(27), chr(92) + 'x1b')}; update or remove frobs"
    )
