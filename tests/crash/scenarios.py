"""What is done while faults strike, and what must be true after each: the laws of an output that is
whole or not there.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import shardkit
from injection import Layer
from shardkit.checkpoint.edits import Edits
from shardkit.checkpoint.entries import TensorEntry
from shardkit.dtypes import parse_dtype
from shardkit.errors import OutputError, ShardkitError
from shardkit.fleet.parts import Part
from shardkit.metadata import safetensors_header
from shardkit.metadata.unit_records import DONE
from shardkit.operations.convert import Report, carry_out
from shardkit.operations.offload_prep import prepare_offload
from shardkit.operations.write_output import How
from shardkit.payloads.payload import Extent, Literal, Trailer
from shardkit.planning.options import ConversionOptions
from shardkit.planning.plan import OutputFile
from shardkit.planning.prepare import prepare

MAX_SHARD = "7kB"
FOREIGN = {
    "mine.txt": b"mine",
    "out.old/mine.txt": b"mine too",
    "out.partial.old/.shardkit/lock": b"mine as well",
}

Tree = dict[str, bytes]


class Interrupted(Exception):
    """What ends a run in the middle."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A command, and what stands there before it.

    Attributes:
        name: for test ids.
        run: the command, given the source and the folder to write in; what it returns is not looked
            at.
        before: makes what stands there before, given the same.
        out: name of the output in that folder.
    """

    name: str
    run: Callable[[Path, Path], Report]
    before: Callable[[Path, Path], None] = lambda source, work: None
    out: str = "out"


def make_source(folder: Path) -> Path:
    """A checkpoint of eight tensors, with companions at two levels."""
    folder.mkdir()
    contents = [bytes([number]) * 3000 for number in range(8)]
    entries = [
        TensorEntry((f"layers.{n}",), parse_dtype("fp32"), (750,), Literal(data))
        for n, data in enumerate(contents)
    ]
    (folder / "model.safetensors").write_bytes(
        safetensors_header.dump(entries, {"format": "pt"}, modulus=64) + b"".join(contents)
    )
    (folder / "config.json").write_text("{}")
    (folder / "sub").mkdir()
    (folder / "sub" / "vocab.txt").write_text("a b c")
    return folder


def make_work(source: Path, work: Path, scenario: Scenario) -> Path:
    """What stands in the folder *work* before *scenario*: foreign files, and what it says
    itself.
    """
    for name, content in FOREIGN.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(content)
    scenario.before(source, work)
    return work


def tree(folder: Path) -> Tree:
    """Every file below *folder*, and every empty folder as a name that ends in a slash."""
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    empty = {
        f"{path.relative_to(folder).as_posix()}/": b""
        for path in folder.rglob("*")
        if path.is_dir() and not any(path.iterdir())
    }
    return files | empty


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Length and time of change of every file below *folder*."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@dataclass(frozen=True, slots=True)
class Case:
    """A scenario in its folders, with what it gives when nothing strikes.

    Attributes:
        scenario: what is done.
        source: the checkpoint that is read.
        work: the folder that is written in.
        template: what stands in it before.
        old: the files of the output before.
        new: everything in the folder after.
    """

    scenario: Scenario
    source: Path
    work: Path
    template: Path
    old: Tree
    new: Tree

    @classmethod
    def at(cls, folder: Path, scenario: Scenario) -> Case:
        """Prepare *scenario* below *folder*, and run it once."""
        source, work, template = (
            make_source(folder / "source"),
            folder / "work",
            folder / "template",
        )
        make_work(source, work, scenario)
        shutil.copytree(work, template)
        old = _output(tree(work), scenario.out)
        scenario.run(source, work)
        new = tree(work)
        left = [
            name
            for name in new.keys() - FOREIGN.keys()
            if ".shardkit/" in name or ".partial" in name or ".old" in name
        ]
        assert not left, f"an undisturbed run leaves {left}"
        return cls(scenario, source, work, template, old, new)

    def reset(self) -> None:
        """Bring back what stood there before."""
        shutil.rmtree(self.work)
        shutil.copytree(self.template, self.work)

    def strike(self, layer: Layer) -> ShardkitError | None:
        """Run with *layer* installed; what it raises on purpose, if anything. Any other error is a
        fault of ours.
        """
        with layer.installed():
            try:
                self.scenario.run(self.source, self.work)
            except ShardkitError as error:
                return error
        return None

    def left(self) -> str:
        """What stands at the output: the "new" one, the "old" one, "nothing", or "neither" of
        them.
        """
        found = _output(tree(self.work), self.scenario.out)
        states = {"nothing": {}, "old": self.old, "new": self._expected}
        return next((state for state, files in states.items() if found == files), "neither")

    def faults(self, before: dict[str, tuple[int, int]], *, killed: bool) -> Iterator[str]:
        """What is wrong after a strike, and after the same command was given again.

        A run that lives on leaves the old output, or the new one. One that was *killed* may leave
        none.
        """
        yield from self._faults_of_state(before)
        if not killed and self.old and not _output(tree(self.work), self.scenario.out):
            yield "the old output is gone, and the new one is not there"
        finished = _recorded(self.work / f"{self.scenario.out}.partial" / DONE)
        try:
            with Layer(self.work).installed():
                report = self.scenario.run(self.source, self.work)
            if report.resumed < finished:
                yield f"of {finished} files that were complete, {report.resumed} were kept"
        except OutputError as error:
            if not (
                " exists" in str(error)
                and _output(tree(self.work), self.scenario.out) == self._expected
            ):
                yield f"the same command again: {error}"
        after = tree(self.work)
        if after != self.new:
            wrong = sorted(
                name
                for name in after.keys() | self.new.keys()
                if after.get(name) != self.new.get(name)
            )
            yield f"the same command again gave something else: {wrong}"

    @property
    def _expected(self) -> Tree:
        return _output(self.new, self.scenario.out)

    def _faults_of_state(self, before: dict[str, tuple[int, int]]) -> Iterator[str]:
        if stamps(self.source) != before:
            yield "the source was touched"
        now = tree(self.work)
        yield from (
            f"{name}, which is foreign, is not as it was"
            for name in FOREIGN
            if now.get(name) != FOREIGN[name]
        )
        found = _output(now, self.scenario.out)
        if found and found not in (self.old, self._expected):
            yield f"the output is neither whole nor the old one: {sorted(found)}"


def _output(files: Tree, out: str) -> Tree:
    """The files of the output; what a commit has still to clear away is none of them."""
    below = {
        name: data for name, data in files.items() if name == out or name.startswith(f"{out}/")
    }
    return {
        name: data for name, data in below.items() if ".shardkit/" not in name and name != f"{out}/"
    }


def _recorded(done: Path) -> int:
    """How many files have a record in the folder *done*."""
    return sum(path.is_file() for path in done.rglob("*"))


def _convert(source: Path, out: Path, **options: object) -> Report:
    edits = Edits()
    checksum = options.get("checksum")
    conversion = prepare(
        source,
        out,
        edits,
        ConversionOptions(MAX_SHARD, checksum=None if checksum is None else str(checksum)),
    )
    return carry_out(conversion, How(jobs=1, overwrite=bool(options.get("overwrite"))))


def _folder(source: Path, work: Path) -> Report:
    return _convert(source, work / "out")


def _together(source: Path, work: Path) -> Report:
    return carry_out(
        prepare(source, work / "out", Edits(), ConversionOptions(MAX_SHARD)), How(jobs=3)
    )


def _deep(source: Path, work: Path) -> Report:
    return _convert(source, work / "out" / "of" / "sight")


def _single(source: Path, work: Path) -> Report:
    return _convert(source, work / "out.safetensors")


def _single_again(source: Path, work: Path) -> Report:
    return _convert(source, work / "out.safetensors", overwrite=True)


def _summed(source: Path, work: Path) -> Report:
    return _convert(source, work / "out", checksum="sha256")


def _by_blocks(source: Path, work: Path) -> Report:
    return carry_out(
        prepare_offload(source, work / "out", Edits(), ConversionOptions(MAX_SHARD)), How(jobs=1)
    )


def _compressed(source: Path, work: Path) -> Report:
    return carry_out(
        prepare(source, work / "out", Edits(), ConversionOptions(MAX_SHARD, compress="zstd")),
        How(jobs=1),
    )


def _parts(source: Path, work: Path) -> Report:
    for part in (Part(2, 2), Part(1, 2)):
        conversion = prepare(source, work / "out", Edits(), ConversionOptions(MAX_SHARD))
        carry_out(conversion, How(jobs=1), part)
    return shardkit.commit(work / "out")


def _overwrite(source: Path, work: Path) -> Report:
    return _convert(source, work / "out", overwrite=True)


def _by_renames(source: Path, work: Path) -> Report:
    with patch("shardkit.system.folders.exchange", lambda first, second: False):
        return _overwrite(source, work)


def _old_output(source: Path, work: Path) -> None:
    shardkit.convert(source, work / "out", max_shard="13kB")


def _old_file(source: Path, work: Path) -> None:
    shardkit.convert(source, work / "out.safetensors", exclude=["layers.0"])


def _interrupted(source: Path, work: Path) -> None:
    written = 0

    def on_bytes(count: int) -> None:
        nonlocal written
        written += count
        if written > 17_000:
            raise Interrupted

    try:
        shardkit.convert(source, work / "out", max_shard=MAX_SHARD, jobs=1, on_bytes=on_bytes)
    except Interrupted:
        return
    raise AssertionError("it was not interrupted")


def _trailed(source: Path, work: Path) -> Report:
    conversion = prepare(source, work / "out", Edits(), ConversionOptions(MAX_SHARD))
    weights = Extent(source / "model.safetensors", 1000, 9000)
    archive = OutputFile(
        "archive.bin", (Literal(b"begin"), weights, Trailer(8, _table), Literal(b"end"))
    )
    plan = replace(conversion.plan, files=(*conversion.plan.files, archive))
    return carry_out(replace(conversion, output=replace(conversion.output, plan=plan)), How(jobs=1))


def _table(crcs: Sequence[int]) -> bytes:
    return struct.pack("<2I", *crcs)


SCENARIOS = (
    Scenario("folder", _folder),
    Scenario("jobs", _together),
    Scenario("parents", _deep, out="out/of/sight"),
    Scenario("single", _single, out="out.safetensors"),
    Scenario("single-overwrite", _single_again, _old_file, out="out.safetensors"),
    Scenario("exchange", _overwrite, _old_output),
    Scenario("renames", _by_renames, _old_output),
    Scenario("resume", _folder, _interrupted),
    Scenario("trailer", _trailed),
    Scenario("checksum", _summed),
    Scenario("blocks", _by_blocks),
    Scenario("compress", _compressed),
    Scenario("parts", _parts),
)


def main_folder(base: Path, name: str) -> Path:
    """A new folder for one case below *base*."""
    folder = base / name
    os.makedirs(folder)
    return folder.resolve()


if __name__ == "__main__":
    print(*(scenario.name for scenario in SCENARIOS), sep="\n")  # noqa: T201 - for programs that go through all
