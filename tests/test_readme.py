"""Every fenced block of the README and of docs/ runs and prints what the page says.

A `console` block is a session: after `$ ` a command, below it what the command prints (stdout and
stderr), where `...` stands for anything. A command that prints nothing on the page may print
anything. A `python` block is a program; a `text` block is how the output of the program above it
ends. Two words after the language change that:

- `no-test`: the block is not run.
- `scaled`: the page shows a checkpoint of 15 GB, and the test runs on one of the same structure
  that is a sixteenth as wide. Sizes in commands are divided to match. In what is printed,
  quantities (`15.2 GB`, `3.1 s`, `88%`) may differ, and so may what the loader chooses by the speed
  of the machine. The blocks of a page run one after another in one folder, where each finds what
  the one before has written.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from repository import ROOT

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
WRITTEN_BY_HAND = (
    *(page for page in PAGES if page.name != "json.md"),
    *(ROOT / name for name in ("SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ROOT / "fixtures/README.md",
    ROOT / "plugins/README.md",
)
FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)

# What the pages call their files, and the fixtures that stand for them.
FILES = {
    "big.bin": "good/zip-module-nested.pt",
    "model.pt": "good/zip-training.pt",
    "model.safetensors": "good/safetensors-tied.safetensors",
    "llama": "good/folder-safetensors",
}

WIDTH = 16  # how much narrower the model of a `scaled` block is; its bytes are the square of that
QUANTITY = re.compile(r"\d[\d,.]* (?:[kMG]?B(?:/s)?|s)\b(?: \([\d.]+ to [\d.]+\))?|\d+%")
# What `explain` says of a model, and follows from the speed of the machine.
CHOSEN = re.compile(r"limit: \w+|\d+ parts|\[[-\d, …]+\]|\d+ blocks: [^\n]*")

PUBLIC = ("shardkit", "shardkit.load", "shardkit.plugin", "shardkit.testing")
LONGEST_README = 200
LONGEST_LINE = 100


@dataclass(frozen=True)
class Block:
    """One fenced block: its page, its language, the words behind that, its text, its line."""

    page: Path
    language: str
    marks: tuple[str, ...]
    body: str
    line: int

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}-line-{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        language, *marks = match["info"].split() or [""]
        line = text.count("\n", 0, match.start()) + 1
        yield Block(page, language, tuple(marks), match["body"], line)


def sessions(body: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with what is printed below it."""
    for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
        command, _, printed = part.partition("\n")
        yield command, printed.strip()


def matches(expected: str, printed: str) -> bool:
    pattern = ".*".join(re.escape(piece) for piece in expected.split("..."))
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


def matches_but_for_quantities(expected: str, printed: str) -> bool:
    """Whether both are the same, with any quantity for any other and any space between columns."""
    return matches(without_quantities(expected), without_quantities(printed))


def without_quantities(text: str) -> str:
    return re.sub(r" +", " ", CHOSEN.sub("#", QUANTITY.sub("#", text)))


def scaled_down(text: str) -> str:
    """The command or program *text*, with sizes in GB as they are for the narrow model."""
    return re.sub(r"(\d+)GB", lambda size: f"{int(size[1]) * 1000 / WIDTH**2:.2f}MB", text)


BLOCKS = [block for page in PAGES for block in blocks(page) if "no-test" not in block.marks]
ALONE = [block for block in BLOCKS if "scaled" not in block.marks]
SCALED = {page: [block for block in blocks(page) if "scaled" in block.marks] for page in PAGES}


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A folder with the files that the pages talk about."""
    for name, fixture in FILES.items():
        copy = shutil.copytree if (ROOT / "fixtures" / fixture).is_dir() else shutil.copy
        copy(ROOT / "fixtures" / fixture, tmp_path / name)
    return tmp_path


def save_narrow_model(folder: Path) -> None:
    """Write a model of the shape of Qwen2.5-7B, `WIDTH` times narrower, in four `.bin` shards."""
    from huggingface_hub import save_torch_state_dict
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=3584 // WIDTH,
        intermediate_size=18944 // WIDTH,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064 // WIDTH,
        tie_word_embeddings=False,
    )
    config.architectures = ["Qwen2ForCausalLM"]
    model = Qwen2ForCausalLM(config).bfloat16()
    folder.mkdir()
    config.save_pretrained(folder)
    most = 3_900_000_000 // WIDTH**2
    save_torch_state_dict(model.state_dict(), folder, max_shard_size=most, safe_serialization=False)


def run(command: list[str] | str, room: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command,
        cwd=room,
        env=os.environ | {"PATH": path},
        shell=isinstance(command, str),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_program(body: str, room: Path) -> str:
    for library in re.findall(r"^import (\w+)$", body, re.MULTILINE):
        pytest.importorskip(library)
    done = run([sys.executable, "-c", body], room)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_pages_have_blocks_to_run() -> None:
    assert {block.page.name for block in ALONE} >= {"convert.md", "streaming.md", "verify.md"}
    assert SCALED[ROOT / "README.md"]


@pytest.mark.parametrize("block", ALONE, ids=str)
def test_a_block_of_a_page_does_what_it_says(block: Block, room: Path) -> None:
    if block.language == "python":
        run_program(block.body, room)
        return
    assert block.language == "console", f"{block} cannot be run; fence it as no-test"
    for command, expected in sessions(block.body):
        done = run(command, room)
        if "needs torch, which is not installed" in done.stdout:
            pytest.skip(f"{command} needs torch")
        # With 1, diff reports differences.
        fine = (0, 1) if command.startswith("shardkit diff ") else (0,)
        assert done.returncode in fine, f"{command}\n{done.stdout}"
        assert not expected or matches(expected, done.stdout), f"{command} printed:\n{done.stdout}"


@pytest.mark.parametrize("page", [page for page in PAGES if SCALED[page]], ids=str)
def test_the_sessions_with_a_large_checkpoint_print_what_the_page_says(
    page: Path, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    save_narrow_model(tmp_path / "qwen-7b")
    printed = ""
    for block in SCALED[page]:
        if block.language == "python":
            printed = run_program(scaled_down(block.body), tmp_path)
        elif block.language == "text":
            assert matches_but_for_quantities(f"...{block.body.strip()}", printed), printed
        else:
            assert block.language == "console", f"{block} cannot be run"
            for command, expected in sessions(block.body):
                done = run(scaled_down(command), tmp_path)
                assert done.returncode == 0, f"{command}\n{done.stdout}"
                assert matches_but_for_quantities(expected, done.stdout), done.stdout


@pytest.mark.parametrize("page", WRITTEN_BY_HAND, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_names_on_a_page_are_public(page: Path) -> None:
    for module, name in names_of_shardkit(page.read_text(encoding="utf-8")):
        assert module in PUBLIC, f"{module}.{name}"
        assert name in importlib.import_module(module).__all__, f"{module}.{name}"


def names_of_shardkit(text: str) -> Iterator[tuple[str, str]]:
    """The modules and names that *text* imports from shardkit, or has as `shardkit.load.name`."""
    imports = re.compile(r"^from (shardkit(?:\.\w+)*) import (?:\(([^)]+)\)|(.+)$)", re.MULTILINE)
    for module, enclosed, rest in imports.findall(text):
        names = (enclosed or rest).split(",")
        yield from ((module, name.strip()) for name in names if name.strip())
    prose = FENCE.sub("", text)
    for dotted in re.findall(r"`(shardkit(?:\.\w+)+)(?=[`(])", prose):
        module, _, name = dotted.rpartition(".")
        if dotted not in PUBLIC and not NOT_A_NAME.fullmatch(dotted):
            yield module, name


NOT_A_NAME = re.compile(r"shardkit\.(aliases|manifest\.json|formats|codecs|\w+/1)")  # as files have


@pytest.mark.parametrize("page", WRITTEN_BY_HAND, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)", text)
    for path, anchor in links:
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{path}#{anchor}"


def anchors(text: str) -> set[str]:
    """The anchors of the headings of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("[a-z]*.md")}
    assert {name for name in pages if f"({name})" not in index} == set()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= LONGEST_README


@pytest.mark.parametrize("page", WRITTEN_BY_HAND, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_prose_of_a_page_is_wrapped(page: Path) -> None:
    lines = FENCE.sub("", page.read_text(encoding="utf-8")).splitlines()
    prose = (line for line in lines if not line.startswith(("|", "![")))
    assert [line for line in prose if len(line) > LONGEST_LINE] == []
