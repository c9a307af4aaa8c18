"""Every public function, class and method has an example in its docstring, and all of them run.

An example runs in a folder of its own that holds a few small files: `model.safetensors` (the
weights of two linear layers), `training.pt` (a model with its optimizer, by Lightning),
`complex128.pt` and `gan.pt` (two models), `notes.txt`, and the folders `folder` and `llama`.
`FORMAT` and `CODEC` stand for the records of a plugin.
"""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import json
import re
import shutil
import struct
import sys
import types
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from repository import ROOT
from shardkit.codecs.zstd import CODEC
from shardkit.formats.safetensors import FORMAT
from shardkit.payloads.payload import Payload

PUBLIC = ("shardkit", "shardkit.load", "shardkit.plugin", "shardkit.testing")
SHAPES = {"0.weight": (8, 4), "0.bias": (8,), "2.weight": (4, 8), "2.bias": (4,)}
# What an example needs that may not be installed.
LIBRARIES = {
    "from shardkit.load": "torch",
    "from torch": "torch",
    "import torch": "torch",
    '"complex128.pt"': "torch",
    '"gan.pt"': "torch",
    '"llama"': "transformers",
    ".numpy()": "numpy",
    "import BY_CODE, Literal, read_all, strided": "numpy",
    "CODEC.compress": "zstandard",
    '"xxh3"': "xxhash",
    "offload_prep(": "xxhash",
}
OPTIONS = doctest.ELLIPSIS
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="paths are written with slashes")


def is_public_code(value: object) -> bool:
    return inspect.isclass(value) or inspect.isfunction(value)


def exported() -> dict[str, object]:
    """Each public class and function, once, by the module that exports it and its name."""
    found: dict[int, tuple[str, object]] = {}
    for module in PUBLIC:
        if module == "shardkit.load" and importlib.util.find_spec("torch") is None:
            continue
        for name in import_module(module).__all__:
            value = getattr(import_module(module), name)
            if is_public_code(value):
                found.setdefault(id(value), (f"{module}.{name}", value))
    return dict(found.values())


def methods(kind: type) -> Iterator[tuple[str, types.FunctionType]]:
    """The public methods that *kind* itself defines, and that no base or protocol documents."""
    bases = [base for base in kind.__mro__[1:] if not base.__module__.startswith("shardkit")]
    contracts = [*bases, *([] if kind is Payload else [Payload])]
    for name, value in vars(kind).items():
        function = inspect.unwrap(getattr(value, "__func__", value))
        if name.startswith("_") or not isinstance(function, types.FunctionType):
            continue
        if not any(hasattr(contract, name) for contract in contracts):
            yield name, function


def examples_of(docstring: str | None) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(inspect.cleandoc(docstring or ""))


EXPORTED = exported()
DOCUMENTED = {
    **EXPORTED,
    **{
        f"{name}.{method}": function
        for name, kind in EXPORTED.items()
        if isinstance(kind, type)
        for method, function in methods(kind)
    },
}
SHOWN = {name: value for name, value in DOCUMENTED.items() if examples_of(value.__doc__)}


def save_weights(path: Path) -> None:
    """Write the layout of the safetensors format: length of the header, header, values."""
    header: dict[str, object] = {}
    content = b""
    for name, shape in SHAPES.items():
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        values = struct.pack(f"<{count}f", *(number / 8 for number in range(count)))
        offsets = [len(content), len(content) + len(values)]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        content += values
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)


def save_torch_files(folder: Path) -> None:
    import torch

    torch.save({"w": torch.zeros(2, dtype=torch.complex128)}, folder / "complex128.pt")
    layer = {"weight": torch.zeros(4, 2), "bias": torch.zeros(4)}
    torch.save(
        {"generator": layer, "discriminator": {name: each + 1 for name, each in layer.items()}},
        folder / "gan.pt",
    )


def save_llama(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every example finds in its folder."""
    folder = tmp_path_factory.mktemp("files")
    save_weights(folder / "model.safetensors")
    shutil.copy(ROOT / "fixtures/good/zip-training.pt", folder / "training.pt")
    (folder / "notes.txt").write_text("Ask for the weights of the second run.\n")
    (folder / "folder").mkdir()
    (folder / "folder" / "config.json").write_text("{}\n")
    save_weights(folder / "folder" / "model.safetensors")
    if importlib.util.find_spec("torch"):
        save_torch_files(folder)
    if importlib.util.find_spec("transformers"):
        save_llama(folder / "llama")
    return folder


@pytest.fixture
def room(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(files, tmp_path / "room")
    monkeypatch.chdir(tmp_path / "room")
    return tmp_path / "room"


def skip_without_libraries(examples: list[doctest.Example]) -> None:
    source = "".join(example.source for example in examples)
    for text, library in LIBRARIES.items():
        if text in source and importlib.util.find_spec(library) is None:
            pytest.skip(f"needs {library}")


@pytest.mark.parametrize("name", DOCUMENTED)
def test_everything_public_has_an_example(name: str) -> None:
    docstring = DOCUMENTED[name].__doc__
    assert docstring, name
    owner = DOCUMENTED.get(name.rpartition(".")[0])
    method = name.rpartition(".")[2]
    shown = "".join(example.source for example in examples_of(owner.__doc__ if owner else ""))
    assert examples_of(docstring) or re.search(rf"\.{method}\(", shown), name


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.usefixtures("room")
def test_an_example_is_true(name: str) -> None:
    value = SHOWN[name]
    examples = examples_of(value.__doc__)
    skip_without_libraries(examples)
    file = inspect.getsourcefile(inspect.unwrap(value)) if callable(value) else None
    test = doctest.DocTest(
        examples,
        {"FORMAT": FORMAT, "CODEC": CODEC},
        name,
        file,
        None,
        None,
    )
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    failed = runner.run(test, out=report.append).failed
    assert not failed, "".join(report)


def test_the_examples_cover_the_modules() -> None:
    assert {name.rpartition(".")[0] for name in EXPORTED} >= {"shardkit", "shardkit.plugin"}
    assert len(SHOWN) > 60
