"""`shardkit place`: where the parts of a checkpoint would lie, for people and machines."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from repository import GOOD
from shardkit.cli import completion, main
from shardkit.load.performance.cost_model import STAGES

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Ten layers of 1 MB, embeddings and a head of 2 MB, as safetensors sorts them."""
    layers = {
        f"model.layers.{at}.w{part}.weight": torch.zeros(125_000)
        for at in range(10)
        for part in (1, 2)
    }
    ends = {
        "model.embed_tokens.weight": torch.zeros(500_000),
        "lm_head.weight": torch.zeros(500_000),
    }
    save_file(
        {**layers, **ends, "model.norm.weight": torch.zeros(250)}, tmp_path / "model.safetensors"
    )
    return tmp_path


def placed(capsys: Capture, *arguments: str | Path) -> list[str]:
    assert main(["place", *map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def test_blocks_are_drawn_by_device(llama: Path, capsys: Capture) -> None:
    lines = placed(capsys, llama, "--max-memory", "cpu=4MB,0=9MB")
    assert lines[0] == f"{llama}/ (safetensors): 13 blocks, 14.0 MB"
    assert [line.split() for line in lines[1:7]] == [
        ["0", "model.embed_tokens", "1", "block", "2.00", "MB"],
        ["model.layers.0", "…", "4", "5", "blocks", "5.00", "MB"],
        ["cpu", "model.layers.5", "…", "6", "2", "blocks", "2.00", "MB"],
        ["disk", "model.layers.7", "…", "9", "3", "blocks", "3.00", "MB"],
        ["model.norm", "1", "block", "1.00", "kB"],
        ["lm_head", "1", "block", "2.00", "MB"],
    ]
    assert "left on 0    2.00 MB of 9.00 MB" in lines
    assert "on disk      5.00 MB, read in every forward" in lines
    assert any(line.split()[0] == "largest" for line in lines)
    assert [line.split(maxsplit=1)[1] for line in lines if line.startswith("reserved")] == [
        "2.00 MB of what is left on 0, for blocks from cpu and disk; lm_head is the largest",
        "2.00 MB of what is left on cpu, for blocks from disk; lm_head is the largest",
    ]
    assert not [line for line in lines if line.startswith("does not fit")]


def test_a_narrower_type_takes_less(llama: Path, capsys: Capture) -> None:
    lines = placed(capsys, llama, "--max-memory", "cpu=0,0=9MB", "--dtype", "bf16")
    assert lines[0].endswith("13 blocks, 7.00 MB as BF16")
    assert not [line for line in lines if "disk" in line]


def test_what_does_not_fit_is_said(llama: Path, capsys: Capture) -> None:
    lines = placed(capsys, llama, "--max-memory", "0=1.5MB,cpu=1GB")
    (line,) = (line for line in lines if line.startswith("does not fit"))
    assert line.endswith(
        "model.embed_tokens (2.00 MB) must be loaded onto 0, which is 500 kB short"
    )


def test_layers_can_be_split_or_joined(llama: Path, capsys: Capture) -> None:
    def names(pattern: str) -> list[str]:
        (line,) = placed(capsys, llama, "--max-memory", "cpu=1GB", "--no-split", pattern, "--json")
        return [block["name"] for block in json.loads(line)["blocks"]]

    assert names(r"layers\.\d+\.w1$")[:4] == [
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.0.w1",
        "model.layers.1",
    ]
    assert names("^model$") == ["model", "lm_head"]


def test_a_machine_gets_every_block(llama: Path, capsys: Capture) -> None:
    (line,) = placed(
        capsys, llama, "--max-memory", "cuda:1=5MB", "--max-memory", "cpu=1MB,0=5MB", "--json"
    )
    document = json.loads(line)
    assert document["budgets"] == {"0": 5_000_000, "1": 5_000_000, "cpu": 1_000_000}
    assert sum(document["used"].values()) == document["nbytes"] == 14_001_000
    assert document["left"]["0"] == document["budgets"]["0"] - document["used"]["0"]
    assert document["largest"] == {"name": "model.embed_tokens", "nbytes": 2_000_000}
    assert document["blocks"][1] == {
        "name": "model.layers.0",
        "device": "0",
        "nbytes": 1_000_000,
        "tensors": ["model.layers.0.w1.weight", "model.layers.0.w2.weight"],
    }
    assert document["lacking"] == {"cpu": 1_000_000}


def test_ties_count_once_and_training_state_does_not(capsys: Capture) -> None:
    lines = placed(capsys, GOOD / "zip-training.pt", "--max-memory", "cpu=1GB")
    assert any(line.startswith("left out") and "optimizer_states" in line for line in lines)
    lines = placed(capsys, GOOD / "zip-module-nested.pt", "--max-memory", "cpu=1GB")
    assert "tied         head.weight = embed.weight" in lines
    assert lines[0].endswith("228 B")


def test_without_a_word_on_the_cpu_this_machine_is_meant(llama: Path, capsys: Capture) -> None:
    lines = placed(capsys, llama)
    assert any(
        line.startswith("note") and "the free memory of this machine" in line for line in lines
    )
    assert lines[1].split()[0] == "cpu"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--max-memory", "cpu"], "'cpu' must be DEVICE=SIZE"),
        (["--max-memory", "disk=1GB"], "DEVICE cpu, mps or the number"),
        (["--max-memory", "0=1GB,cuda:0=2GB"], "device 0 has two sizes"),
        (["--max-memory", "0=much"], "'much' is not a size"),
        (["--no-split", "("], "not a regular expression"),
        (
            ["--rates", "disc=1GB"],
            "'disc=1GB' must be NAME=SIZE, and NAME one of disk, copy, link, compute",
        ),
        (["--rates", "disk=fast"], "'fast' is not a size"),
        (["--predict", "--tokens", "0"], "0 is not in the range"),
        (["--dtype", "int8"], "not a floating-point type"),
    ],
)
def test_a_command_line_that_says_nothing_is_refused(
    llama: Path, capsys: Capture, arguments: list[str], sentence: str
) -> None:
    assert main(["place", str(llama), *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_a_file_without_tensors_has_nothing_to_place(tmp_path: Path, capsys: Capture) -> None:
    torch.save({"epoch": 3}, tmp_path / "x.pt")
    assert main(["place", str(tmp_path / "x.pt")]) == 1
    assert "it holds no tensors" in capsys.readouterr().err


def test_a_part_of_a_file_can_be_placed(tmp_path: Path, capsys: Capture) -> None:
    torch.save(
        {"model": {"w": torch.ones(2, 2)}, "ema": {"w": torch.zeros(3, 2)}}, tmp_path / "two.pt"
    )
    assert main(["place", str(tmp_path / "two.pt")]) == 1
    assert "--root" in capsys.readouterr().err
    assert placed(capsys, tmp_path / "two.pt", "--root", "ema", "--max-memory", "cpu=1MB")[
        0
    ].endswith("1 block, 24 B")


@pytest.fixture
def matrices(tmp_path: Path) -> Path:
    """Ten layers of 1 MB, that are multiplied, behind a table of 2 MB, that is looked into."""
    layers = {f"layers.{at}.weight": torch.zeros(500, 500) for at in range(10)}
    save_file({"embed.weight": torch.zeros(1000, 500), **layers}, tmp_path / "model.safetensors")
    return tmp_path


def test_a_rate_can_be_given_for_each_stage_of_a_forward() -> None:
    assert completion.RATES == STAGES


def test_a_forward_is_predicted_from_rates_that_are_given(matrices: Path, capsys: Capture) -> None:
    rates = "disk=1MB/s,compute=1GB"
    lines = placed(capsys, matrices, "--max-memory", "cpu=9MB", "--rates", rates)
    (line,) = (line for line in lines if line.startswith("a forward"))
    assert "limit: disk" in line
    assert "rates        disk 1.00 MB/s, compute 1.00 GB/s" in lines
    (line,) = placed(capsys, matrices, "--max-memory", "cpu=9MB", "--rates", rates, "--json")
    document = json.loads(line)
    on_disk = document["used"]["disk"]
    assert document["read_per_forward"] == {"disk": on_disk, "cpu": 0}
    predicted = document["forecast"]["predicted"]
    assert predicted["busy"] == pytest.approx(
        {"disk": on_disk / 1e6, "copy": 0, "link": 0, "compute": 0.01}
    )
    assert (
        predicted["first"] >= predicted["seconds"] >= document["forecast"]["least"] == on_disk / 1e6
    )
    assert predicted["limit"] == "disk"
    ring = document["forecast"]["ring"]
    assert ring["lacking"] == max(0, ring["nbytes"] - document["left"]["cpu"])
    assert any(
        line.startswith("buffer") and line.endswith("more than is left") for line in lines
    ) == bool(ring["lacking"])


def test_without_a_rate_of_computing_it_says_what_bringing_the_weights_takes(
    matrices: Path, capsys: Capture
) -> None:
    lines = placed(
        capsys, matrices, "--max-memory", "0=6MB,cpu=4MB", "--rates", "disk=1MB,link=2MB"
    )
    assert [line for line in lines if line.startswith(("on disk", "on cpu"))] == [
        "on disk      4.00 MB, read in every forward",
        "on cpu       3.00 MB, copied to 0 in every forward",
    ]
    (line,) = (line for line in lines if line.startswith("at least"))
    assert line.startswith("at least     4 s for a forward, to transfer the weights")
    assert not [line for line in lines if line.startswith("a forward")]


def test_where_nothing_is_brought_only_computing_takes_time(
    matrices: Path, capsys: Capture
) -> None:
    lines = placed(capsys, matrices, "--max-memory", "cpu=1GB", "--rates", "compute=10MB")
    assert "a forward    1 s, the first 1 s; limit: compute (compute 1 s)" in lines
    assert not [line for line in lines if line.startswith("ring")]


def test_the_rates_of_this_machine_are_measured_and_given_ones_overrule_them(
    llama: Path, capsys: Capture
) -> None:
    (line,) = placed(
        capsys,
        llama,
        "--max-memory",
        "cpu=9MB",
        "--predict",
        "--tokens",
        "3",
        "--rates",
        "disk=5MB",
        "--json",
    )
    forecast = json.loads(line)["forecast"]
    assert forecast["rates"]["disk"] == 5e6
    assert forecast["rates"]["copy"] > 0 < forecast["rates"]["compute"]
    assert forecast["rates"]["link"] is None
    assert forecast["predicted"]["seconds"] > 0


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_an_accelerator_that_torch_is_made_for_and_that_is_not_here_has_no_rates(
    matrices: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    (line,) = placed(capsys, matrices, "--max-memory", "0=6MB,cpu=4MB", "--predict", "--json")
    forecast = json.loads(line)["forecast"]
    assert (forecast["rates"]["link"], forecast["rates"]["compute"]) == (None, None)
    assert forecast["rates"]["disk"] > 0


def test_without_being_asked_nothing_is_predicted(llama: Path, capsys: Capture) -> None:
    (line,) = placed(capsys, llama, "--max-memory", "cpu=9MB", "--json")
    assert json.loads(line)["forecast"] is None
    assert json.loads(line)["read_per_forward"]["disk"] > 0


def test_without_torch_a_sentence_says_that_it_is_needed(
    llama: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shardkit.load.performance.forecast", None)
    assert main(["place", str(llama), "--predict"]) == 1
    assert "needs torch, which is not installed" in capsys.readouterr().err
