"""Plugins as they are installed, seen from outside: what is broken shows in `shardkit formats` and
stops nobody.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from repository import ROOT

FIXTURES = ROOT / "fixtures"
NPZ = ROOT / "plugins" / "shardkit-npz"

TOY = """
from shardkit.plugin import BY_CODE, Checkpoint, Format, TensorEntry
def sniff(source): return source.head.startswith(b"TOY!")
def scan(source): return Checkpoint((TensorEntry(("{name}",), BY_CODE["U8"], (4,), source.payload(0, 4)),))
FORMAT = Format(name="{name}", suffixes=(".toy",), sniff=sniff, scan=scan)
"""
CODEC = (
    "from shardkit.plugin import Codec\nFORMAT = Codec('{name}', '.ty', lambda head: "
    "{verdict}, lambda pieces: iter(()))"
)

# Name of the plugin: its group, its module and what is said of it.
BROKEN = {
    "unimportable": ("formats", "import nowhere_to_be_found", "ModuleNotFoundError"),
    "leaving": ("formats", "raise SystemExit(3)", "SystemExit"),
    "mistyped": ("formats", "FORMAT = 'a format'", "must be a Format, found 'a format'"),
    "outdated": (
        "formats",
        TOY.format(name="outdated").replace("suffixes=", "api=0, suffixes="),
        "version 0 of the plugin contract",
    ),
    "missing-codec": ("codecs", "import nowhere_to_be_found", "ModuleNotFoundError"),
    "mistyped-codec": (
        "codecs",
        TOY.format(name="mistyped-codec"),
        "must be a Codec, found a Format",
    ),
}
# These load, and fail when they are asked about a file.
FAILING = {
    "raising": (
        "formats",
        TOY.format(name="raising").replace('source.head.startswith(b"TOY!")', "source.nowhere"),
    ),
    "raising-codec": ("codecs", CODEC.format(name="raising-codec", verdict="head[5000]")),
}


def install(site: Path, name: str, group: str, code: str) -> None:
    """A distribution called *name*, as pip leaves it."""
    module = name.replace("-", "_")
    info = site / f"{module}-1.2.dist-info"
    info.mkdir(parents=True)
    (site / f"{module}.py").write_text(code)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: shardkit-{name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[shardkit.{group}]\n{name} = {module}:FORMAT\n")


def install_npz(site: Path) -> None:
    """shardkit-npz, from its own source and metadata."""
    project = tomllib.loads((NPZ / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    points = project["entry-points"]["shardkit.formats"]
    info = site / "shardkit_npz-1.2.dist-info"
    shutil.copytree(NPZ / "src", site, dirs_exist_ok=True)
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 1.2\n"
    )
    (info / "entry_points.txt").write_text(
        "[shardkit.formats]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
    )


def hide_npz(site: Path) -> None:
    """A distribution of the same name that brings nothing stands before the one that may be
    installed.
    """
    info = site / "shardkit_npz-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shardkit-npz\nVersion: 0\n")


def python(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=site, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )


def shardkit(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python(site, "-m", "shardkit", *arguments)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of installed plugins, all of them broken."""
    site = tmp_path / "site"
    for name, (group, code, _) in BROKEN.items():
        install(site, name, group, code)
    for name, (group, code) in FAILING.items():
        install(site, name, group, code)
    return site


def test_broken_plugins_are_listed_with_their_reasons(site: Path) -> None:
    done = shardkit(site, "formats")
    assert done.returncode == 0, done.stderr
    for name, (group, _, reason) in BROKEN.items():
        (line,) = (line for line in done.stdout.splitlines() if f"shardkit.{group}:{name} " in line)
        assert f"of shardkit-{name} 1.2: " in line
        assert reason in line
        assert f"update or remove shardkit-{name}" in line
    assert "safetensors" in done.stdout


def test_broken_plugins_are_listed_for_machines_too(site: Path) -> None:
    listed = json.loads(shardkit(site, "formats", "--json").stdout)
    errors = {each["name"]: each["error"] for each in (*listed["formats"], *listed["codecs"])}
    assert {name for name, error in errors.items() if error} == set(BROKEN)


@pytest.mark.parametrize(
    "name", ["safetensors-matrix.safetensors", "zip-shared.pt", "compressed-zip.pt.zst"]
)
def test_broken_plugins_do_not_stand_in_the_way_of_other_files(
    name: str, site: Path, tmp_path: Path
) -> None:
    done = shardkit(
        site,
        "convert",
        str(FIXTURES / "good" / name),
        "-o",
        str(tmp_path / "out"),
        "--root",
        ".",
        "-q",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_what_a_broken_plugin_might_have_known_is_said(site: Path, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"TOY!" * 9)
    done = shardkit(site, "inspect", str(tmp_path / "x.bin"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for name in ("unimportable", "leaving", "mistyped", "outdated", "raising"):
        assert name in done.stderr


@pytest.mark.parametrize(
    "name", [name for name, (group, *_) in BROKEN.items() if group == "formats"]
)
def test_a_broken_plugin_that_is_asked_for_is_named_with_its_reason(
    name: str, site: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.bin").write_bytes(b"TOY!" * 9)
    done = shardkit(site, "inspect", str(tmp_path / "x.bin"), "--format", name)
    assert done.returncode == 1
    assert f"shardkit-{name} 1.2" in done.stderr
    assert BROKEN[name][2] in done.stderr
    assert "Traceback" not in done.stderr


def test_of_two_claimants_both_are_named_and_one_is_picked(tmp_path: Path) -> None:
    site = tmp_path / "site"
    install(site, "tin", "formats", TOY.format(name="tin"))
    install(site, "toy", "formats", TOY.format(name="toy"))
    (tmp_path / "x.bin").write_bytes(b"TOY!")
    refused = shardkit(site, "inspect", str(tmp_path / "x.bin"))
    assert refused.returncode == 1
    assert "could be tin and toy" in refused.stderr
    assert "--format tin" in refused.stderr
    picked = shardkit(site, "inspect", str(tmp_path / "x.bin"), "--format", "toy", "--json")
    assert picked.returncode == 0, picked.stderr
    assert '"toy"' in picked.stdout


OPEN_ALL = """
import json, sys
from pathlib import Path
import shardkit
from shardkit.sources import registry

def verdict(path):
    try:
        return shardkit.open(path).format
    except shardkit.ShardkitError as error:
        return f"{type(error).__name__}: {error} ({error.hint})"

fixtures = [path for folder in ("good", "hostile") for path in sorted(Path(sys.argv[1], folder).iterdir())]
json.dump([[each.name for each in registry.formats()], {str(path): verdict(path) for path in fixtures}], sys.stdout)
"""


def test_with_shardkit_npz_installed_every_fixture_is_what_it_was(tmp_path: Path) -> None:
    install_npz(tmp_path / "with")
    hide_npz(tmp_path / "without")
    runs = [python(tmp_path / site, "-c", OPEN_ALL, str(FIXTURES)) for site in ("with", "without")]
    assert [done.stderr for done in runs] == ["", ""]
    (names_with, verdicts_with), (names_without, verdicts_without) = (
        json.loads(done.stdout) for done in runs
    )
    assert set(names_with) - set(names_without) == {"npy", "npz"}
    assert verdicts_with == verdicts_without
    assert len(verdicts_with) > 50


@pytest.mark.torch
def test_npz_goes_through_every_command(tmp_path: Path) -> None:
    site = tmp_path / "site"
    install_npz(site)
    source, archive, shards = (
        FIXTURES / "good" / "zip-shared.pt",
        tmp_path / "x.npz",
        tmp_path / "shards",
    )
    for command in (
        ("convert", str(source), "-o", str(archive), "--root", ".", "--dtype", "fp32", "-q"),
        ("inspect", str(archive)),
        ("verify", str(archive), "--against", str(source), "--root", ".", "--dtype", "fp32"),
        ("convert", str(archive), "-o", str(shards), "--max-shard", "10kB", "-q"),
        ("diff", str(archive), str(shards)),
    ):
        done = shardkit(site, *command)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
