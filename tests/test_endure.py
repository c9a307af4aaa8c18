"""What the world does to a run: full disks, read-only folders, sources that cannot be read. One
sentence, nothing lost.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import shardkit
from shardkit.cli import main
from shardkit.errors import FormatError, Malformed, NoRoom, OutputError
from shardkit.metadata.unit_records import DONE

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="mounts, and reads paths of descriptors from /proc"
)

if sys.platform == "linux":
    from injection import READS, Layer, failing
    from scenarios import make_source, stamps, tree

MAX_SHARD = "7kB"
MIB = 1 << 20


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source")


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """What an undisturbed run writes."""
    shardkit.convert(source, tmp_path / "whole", max_shard=MAX_SHARD)
    return tree(tmp_path / "whole")


def mounted(folder: Path, options: str) -> bool:
    folder.mkdir(exist_ok=True)
    return (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True
        ).returncode
        == 0
    )


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts small disks; where that may not be done, the test is skipped."""
    disks: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(disks)}"
        if not mounted(folder, options):
            pytest.skip("only root may mount a small disk")
        disks.append(folder)
        return folder

    yield mount
    for folder in disks:
        subprocess.run(["umount", str(folder)], check=True)


def test_too_small_a_disk_is_told_before_the_first_byte(
    disk: Callable[[str], Path], source: Path
) -> None:
    small = disk("size=16k")
    with pytest.raises(NoRoom, match=r"free, and the output of .* needs") as caught:
        shardkit.convert(source, small / "out")
    assert caught.value.hint
    assert os.listdir(small) == []


def test_a_disk_that_fills_up_meanwhile_is_told_and_goes_on_when_there_is_room(
    disk: Callable[[str], Path], source: Path, whole: dict[str, bytes]
) -> None:
    small = disk("size=160k")
    others = small / "others"

    def fill(count: int) -> None:
        with suppress(OSError), open(others, "ab", buffering=0) as file:
            file.write(bytes(40 << 10))

    before = stamps(source)
    with pytest.raises(OutputError, match="No space left on device") as caught:
        shardkit.convert(source, small / "out", max_shard=MAX_SHARD, jobs=1, on_bytes=fill)
    assert "resumes where it stopped" in str(caught.value.hint)
    assert sorted(os.listdir(small)) == ["others", "out.partial"]
    others.unlink()
    assert shardkit.convert(source, small / "out", max_shard=MAX_SHARD).resumed > 0
    assert tree(small / "out") == whole
    assert os.listdir(small) == ["out"]
    assert stamps(source) == before


def test_a_read_only_disk_is_a_sentence(
    disk: Callable[[str], Path], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(source), "-o", str(disk("ro") / "out")]) == 1
    said = capsys.readouterr().err
    assert re.search(r"out\.partial: .*Read-only file system", said)
    assert "Traceback" not in said


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_a_source_that_may_not_be_read_is_a_sentence(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").chmod(0)
    with pytest.raises(FormatError, match="Permission denied"):
        shardkit.convert(source, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE], ids=errno.errorcode.get)
def test_a_source_that_fails_at_any_call_is_named_and_the_run_goes_on_later(
    number: int, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    before = stamps(source)
    said: list[str] = []
    for at in range(10_000):
        layer = Layer(source, at, failing(number), watched=READS, lasting=True)
        out = tmp_path / "work" / f"{at}"
        out.parent.mkdir(exist_ok=True)
        with layer.installed():
            try:
                shardkit.convert(source, out, max_shard=MAX_SHARD, jobs=1, sync=False)
            except FormatError as error:
                said.append(str(error))
        if layer.struck is None:
            break
        done = recorded(out)
        if not out.exists():
            assert (
                shardkit.convert(source, out, max_shard=MAX_SHARD, jobs=1, sync=False).resumed
                >= done
            )
        assert {
            name: data
            for name, data in tree(out).items()
            if name in whole and name.startswith("model")
        } == {name: data for name, data in whole.items() if name.startswith("model")}
        assert stamps(source) == before
    assert len(said) > 10
    assert all(sentence.startswith(str(source)) for sentence in said)
    assert not [name for name in os.listdir(tmp_path / "work") if name.endswith(".partial")]


def recorded(out: Path) -> int:
    done = out.with_name(f"{out.name}.partial") / DONE
    return sum(path.is_file() for path in done.rglob("*"))


@pytest.mark.parametrize("at", [1, 9_000, 20_000])
def test_a_source_that_is_written_to_while_it_is_read_is_found_before_the_commit(
    at: int, source: Path, tmp_path: Path
) -> None:
    written = 0

    def meddle(count: int) -> None:
        nonlocal written
        written += count
        if written >= at:
            with open(source / "model.safetensors", "r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"!")
            os.utime(source / "model.safetensors", ns=(1, written))

    with pytest.raises(Malformed, match="changed while it was read"):
        shardkit.convert(source, tmp_path / "out", max_shard=MAX_SHARD, jobs=1, on_bytes=meddle)
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_appears_at_the_output_meanwhile_is_not_replaced(
    overwrite: bool, source: Path, tmp_path: Path
) -> None:
    def appear(count: int) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "mine.txt").write_text("mine")

    with pytest.raises(OutputError, match=r"exists|which shardkit did not write"):
        shardkit.convert(source, tmp_path / "out", overwrite=overwrite, on_bytes=appear)
    assert tree(tmp_path / "out") == {"mine.txt": b"mine"}
    (tmp_path / "out" / "mine.txt").unlink()
    assert shardkit.convert(source, tmp_path / "out", overwrite=overwrite).resumed == 3, (
        "all of it was done"
    )


def test_the_partial_folder_of_another_output_is_no_commit_that_was_killed(
    source: Path, tmp_path: Path
) -> None:
    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shardkit.convert(source, tmp_path / "out", max_shard=MAX_SHARD, on_bytes=stop)
    kept = tree(tmp_path / "out.partial")
    with pytest.raises(OutputError):
        shardkit.convert(source, tmp_path / "out.partial", max_shard=MAX_SHARD, overwrite=True)
    assert tree(tmp_path / "out.partial") == kept
