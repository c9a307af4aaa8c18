"""The examples of docs/fleet.md, run as the schedulers would: with the environment that each sets,
and for real where the program is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import shardkit
from repository import GOOD, ROOT

PAGE = (ROOT / "docs" / "fleet.md").read_text(encoding="utf-8")
SOURCE = GOOD / "zip-training.pt"


def block(begin: str) -> str:
    """The block of the page that begins so."""
    match = re.search(
        rf"^```\w+ no-test\n({re.escape(begin)}.*?)^```$", PAGE, re.DOTALL | re.MULTILINE
    )
    assert match is not None
    return match[1]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """One in which `shardkit` is this one, and SOURCE and OUT are set."""
    program = tmp_path / "bin" / "shardkit"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m shardkit "$@"\n')
    program.chmod(0o755)
    return {
        **os.environ,
        "PATH": os.pathsep.join(
            [str(program.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
        ),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "SOURCE": str(SOURCE),
        "OUT": str(tmp_path / "out"),
        "HOME": str(tmp_path),
    }


def run(script: str, environment: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", "-euc", script.replace("5GB", "700B")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def check(out: Path) -> None:
    assert shardkit.verify(out, SOURCE).same
    assert len(list(out.glob("*.safetensors"))) == 7


def test_the_job_array_of_slurm(environment: dict[str, str]) -> None:
    script = block("#!/bin/bash\n#SBATCH --array")
    for task in (3, 1, 4, 2):
        array = {"ID": task, "MIN": 1, "MAX": 4, "STEP": 1, "COUNT": 4}
        slurm = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()}
        run(script, environment | slurm)
    check(shardkit.commit(environment["OUT"]).out)


def test_the_indexed_job_of_kubernetes(environment: dict[str, str], tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load(block("apiVersion: batch/v1"))
    assert job["spec"]["completionMode"] == "Indexed"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (count,) = container["env"]
    assert (count["name"], count["value"]) == ("JOB_COMPLETIONS", str(job["spec"]["completions"]))
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(SOURCE, data / "big")
    words = [word.replace("/data", str(data)) for word in container["command"]]
    for index in range(job["spec"]["completions"]):
        indexed = {"JOB_COMPLETION_INDEX": str(index), "JOB_COMPLETIONS": count["value"]}
        subprocess.run(words, env=environment | indexed, check=True, capture_output=True)
    shardkit.commit(data / "big-shards")
    assert shardkit.verify(data / "big-shards", SOURCE).same


@pytest.mark.torch
def test_torchrun(environment: dict[str, str]) -> None:
    torchrun = f'"{sys.executable}" -m torch.distributed.run --master-addr 127.0.0.1'
    run(block("torchrun ").replace("torchrun", torchrun, 1), environment)
    check(Path(environment["OUT"]))


@pytest.mark.skipif(shutil.which("parallel") is None, reason="needs GNU parallel")
def test_gnu_parallel(environment: dict[str, str]) -> None:
    run(block("parallel "), environment)
    check(Path(environment["OUT"]))
