"""Plugins come in by entry points, and a broken one stands in nobody's way."""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from repository import ROOT
from shardkit.errors import PlanError, PluginError, UnknownFormat
from shardkit.limits import Limits
from shardkit.payloads.payload import Literal
from shardkit.sources import registry
from shardkit.sources.format import Source

Install = Callable[..., None]

PLUGIN = """
from shardkit.plugin import Checkpoint, Format
def sniff(source): return source.head[:3] == b"TOY"
def scan(source): return Checkpoint(())
FORMAT = Format(name="toy", suffixes=(".toy",), sniff=sniff, scan=scan)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a distribution of one module, as pip would, for the length of a test."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(
        name: str,
        code: str,
        *,
        entry: str = "toy",
        value: str = "FORMAT",
        group: str = registry.FORMATS,
    ) -> None:
        module = name.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"{module}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{entry} = {module}:{value}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)
        importlib.invalidate_caches()
        forget()

    forget()
    yield install
    monkeypatch.undo()
    forget()


def forget() -> None:
    registry.installed.cache_clear()
    registry.formats.cache_clear()
    registry.codecs.cache_clear()


def held(content: bytes) -> Source:
    return Source(Path("file.bin"), Literal(content), limits=Limits())


SAFETENSORS = (2).to_bytes(8, "little") + b"{}"


def test_the_built_in_ones_are_those_of_the_package_metadata() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {
        group: project["entry-points"][group] for group in (registry.FORMATS, registry.CODECS)
    }
    assert declared == registry._BUILT_IN  # the table stands for the metadata where there is none
    assert {each.name for each in registry.formats()} >= project["entry-points"][
        registry.FORMATS
    ].keys()
    assert {each.name for each in registry.codecs()} >= project["entry-points"][
        registry.CODECS
    ].keys()


def test_every_built_in_one_can_be_used() -> None:
    assert [each.error for each in registry.formats() if each.error] == []
    assert [each.error for each in registry.codecs() if each.error] == []


def test_a_plugin_is_found_and_recognises_its_files(install: Install) -> None:
    install("shardkit-toy", PLUGIN)
    assert registry.recognise(held(b"TOY!")).name == "toy"
    assert registry.format_named("toy").suffixes == (".toy",)
    assert {".toy", ".safetensors", ".zst"} <= registry.suffixes()
    loaded = next(each for each in registry.formats() if each.name == "toy")
    assert (loaded.distribution, loaded.group, loaded.error) == (
        "shardkit-toy 1.2",
        "shardkit.formats",
        None,
    )


def test_what_brings_a_format_is_read_only_when_it_is_asked_for(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("shardkit-toy", PLUGIN)
    monkeypatch.delattr(Distribution, "metadata")
    assert registry.recognise(held(b"TOY!")).name == "toy"
    assert registry.recognise(held(SAFETENSORS)).name == "safetensors"


BROKEN = {
    "it cannot be imported": (
        "raise RuntimeError('no\\nluck')",
        "cannot be loaded: RuntimeError: 'no\\nluck'",
    ),
    "it imports what is not there": (
        "import nowhere_to_be_found",
        "cannot be loaded: ModuleNotFoundError",
    ),
    "it is no Python": ("def :", "cannot be loaded: SyntaxError"),
    "it lacks the record": ("", "cannot be loaded: AttributeError"),
    "the record is something else": (
        "FORMAT = {'name': 'toy'}",
        "must be a Format, found a dict of 1",
    ),
    "the record is a codec": (
        "from shardkit.codecs.zstd import CODEC as FORMAT",
        "must be a Format, found a Codec",
    ),
    "it is made for another contract": (
        PLUGIN.replace('name="toy",', 'name="toy", api=2,'),
        "version 2 of the plugin contract",
    ),
    "its name is another": (
        PLUGIN.replace('"toy"', '"tin"'),
        "is named 'tin', but its entry point is named 'toy'",
    ),
}


@pytest.mark.parametrize(("code", "sentence"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_is_kept_as_its_error_and_blocks_nothing(
    install: Install, code: str, sentence: str
) -> None:
    install("shardkit-toy", code)
    loaded = next(each for each in registry.formats() if each.name == "toy")
    assert loaded.record is None
    assert isinstance(loaded.error, PluginError)
    assert str(loaded.error).startswith("plugin shardkit.formats:toy of shardkit-toy 1.2: ")
    assert sentence in str(loaded.error)
    assert registry.recognise(held(SAFETENSORS)).name == "safetensors"
    with pytest.raises(PluginError, match=r"shardkit-toy 1\.2"):
        registry.format_named("toy")
    with pytest.raises(UnknownFormat) as caught:
        registry.recognise(held(b"TOY!" * 9))
    assert "toy could not be loaded: run `shardkit formats` to see why" in str(caught.value.hint)


def test_a_plugin_that_fails_on_a_file_blocks_no_other_format(install: Install) -> None:
    install("shardkit-toy", PLUGIN.replace('source.head[:3] == b"TOY"', "source.head[99]"))
    assert registry.recognise(held(SAFETENSORS)).name == "safetensors"
    with pytest.raises(UnknownFormat) as caught:
        registry.recognise(held(b"TOY!"))
    assert "toy could not be loaded" in str(caught.value.hint)


def test_a_plugin_cannot_take_the_name_of_a_built_in_format(install: Install) -> None:
    install("shardkit-toy", PLUGIN.replace('"toy"', '"safetensors"'), entry="safetensors")
    assert registry.format_named("safetensors").lay_out is not None
    errors = [str(each.error) for each in registry.formats() if each.error]
    assert any("has the name of a built-in one" in error for error in errors)


def test_two_claimants_are_both_named(install: Install) -> None:
    install("shardkit-toy", PLUGIN)
    install("shardkit-tin", PLUGIN.replace('"toy"', '"tin"'), entry="tin")
    with pytest.raises(UnknownFormat, match=r"file\.bin: could be tin and toy") as caught:
        registry.recognise(held(b"TOY!"))
    assert caught.value.claimed
    assert caught.value.hint == "choose one with format='tin'"


def test_a_codec_is_found_by_the_first_bytes(install: Install) -> None:
    code = (
        "from shardkit.plugin import Codec\nCODEC = Codec('toy', '.ty', lambda head: head[:2] "
        "== b'ty', lambda pieces: iter(()))"
    )
    install("shardkit-toy", code, group=registry.CODECS, value="CODEC")
    codec = registry.codec_of(held(b"typed"))
    assert codec is not None
    assert codec.name == "toy"
    assert registry.codec_of(held(b"other")) is None


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        PlanError, match=r"there is no format called 'gguf'; the formats are .*safetensors"
    ):
        registry.format_named("gguf")


def test_a_suffix_chooses_what_is_written() -> None:
    writer = registry.writer_for(".safetensors")
    assert writer is not None
    assert writer.name == "safetensors"
    assert registry.writer_for(".bin") is None
    assert registry.writer_for("") is None
