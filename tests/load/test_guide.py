"""Accelerate's guide as it is written, with one changed import, on whatever holds the weights; and
it writes nothing.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import shardkit
from accelerators import COUNT, KIND
from shardkit.errors import FormatError, LoadError
from shardkit.load import (
    Paged,
    close,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
)
from shardkit.operations.offload_prep import offload_prep

WIDTH, LAYERS = 16, 11
Budgets = dict[int | str | torch.device, int | float | str]
ROOM: Budgets = {"cpu": 12_000}  # for some of the blocks


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return x + hidden


class MyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x


INPUT = torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH)


@pytest.fixture(scope="module")
def trained() -> MyModel:
    torch.manual_seed(0)
    model = MyModel().eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) * 0.3 + 0.1)
    return model


def zipped(state: dict[str, torch.Tensor], folder: Path) -> Path:
    torch.save(state, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def legacy(state: dict[str, torch.Tensor], folder: Path) -> Path:
    torch.save(state, folder / "old.bin", _use_new_zipfile_serialization=False)
    return folder / "old.bin"


def safe(state: dict[str, torch.Tensor], folder: Path) -> Path:
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def index(state: dict[str, torch.Tensor], folder: Path) -> Path:
    names = list(state)
    shards = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for shard, inside in shards.items():
        save_file({name: state[name] for name in inside}, folder / shard)
    weight_map = {name: shard for shard, inside in shards.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def snapshot(state: dict[str, torch.Tensor], folder: Path) -> Path:
    """As the Hub's cache has them: links into a store of blobs."""
    (folder / "blobs").mkdir()
    there = folder / "snapshots" / ("f" * 40)
    there.mkdir(parents=True)
    (folder / "plain").mkdir()
    for number, file in enumerate(sorted(index(state, folder / "plain").iterdir())):
        shutil.move(file, folder / "blobs" / str(number))
        (there / file.name).symlink_to(Path("../../blobs") / str(number))
    return there


def converted(state: dict[str, torch.Tensor], folder: Path) -> Path:
    shardkit.convert(zipped(state, folder), folder / "shards", max_shard="20kB")
    return folder / "shards"


def prepared(state: dict[str, torch.Tensor], folder: Path) -> Path:
    offload_prep(zipped(state, folder), folder / "prepared")
    return folder / "prepared"


CONTAINERS: list[Callable[[dict[str, torch.Tensor], Path], Path]] = [
    zipped,
    legacy,
    safe,
    index,
    snapshot,
    converted,
    prepared,
]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, and this one is empty."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below *folder*, with its size and the time of its last change."""
    stats = ((path, path.lstat()) for path in folder.rglob("*"))
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in stats}


@pytest.mark.usefixtures("temporary")
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("max_memory", [ROOM, None], ids=["cpu and disk", "cpu"])
def test_the_guide_runs_as_written_and_writes_nothing(
    container: Callable[[dict[str, torch.Tensor], Path], Path],
    max_memory: Budgets | None,
    trained: MyModel,
    tmp_path: Path,
) -> None:
    (tmp_path / "there").mkdir()
    checkpoint_file = container(trained.state_dict(), tmp_path / "there")
    before = listing(tmp_path)

    with init_empty_weights():
        model = MyModel().eval()
    model = load_checkpoint_and_dispatch(
        model,
        checkpoint=checkpoint_file,
        device_map="auto",
        max_memory=max_memory,
        no_split_module_classes=["Block"],
    )
    whole = COUNT == 1 and not max_memory  # it is all on one accelerator
    input = INPUT.to(KIND) if whole else INPUT
    output = model(input)

    near = None if COUNT > 1 else 0  # several devices, each with an arithmetic of its own
    torch.testing.assert_close(
        output, copy.deepcopy(trained).to(input.device)(input), rtol=near, atol=near
    )
    assert torch.equal(model(input), output)
    assert isinstance(model.hf_device_map, dict)
    assert set(model.hf_device_map.values()) == (
        {"cpu", "disk"} if max_memory else {*range(COUNT)} if COUNT else {"cpu"}
    )
    assert listing(tmp_path) == before
    close(model)
    assert listing(tmp_path) == before


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-600])


def without_a_name(file: Path) -> None:
    state = torch.load(file)
    del state["layers.3.up.weight"]
    torch.save(state, file)


def of_another_shape(file: Path) -> None:
    torch.save(torch.load(file) | {"layers.3.up.weight": torch.ones(2)}, file)


@pytest.mark.usefixtures("temporary")
@pytest.mark.parametrize("fault", [cut, without_a_name, of_another_shape])
@pytest.mark.parametrize("device", ["cpu", "disk"])
def test_a_load_that_fails_leaves_no_files_and_the_model_as_it_was(
    fault: Callable[[Path], None], device: str, trained: MyModel, tmp_path: Path
) -> None:
    file = zipped(trained.state_dict(), tmp_path)
    fault(file)
    before = listing(tmp_path)
    loads: list[Callable[[nn.Module], object]] = [
        lambda model: load_checkpoint_in_model(model, file, {"": device}),
        lambda model: load_checkpoint_and_dispatch(model, file, {"": device}),
    ]
    for load in loads:
        with init_empty_weights():
            model = MyModel()
        with pytest.raises((FormatError, LoadError)):
            load(model)
        assert all(parameter.is_meta for parameter in model.parameters())
        assert listing(tmp_path) == before


@pytest.mark.filterwarnings("ignore")
def test_accelerate_leaves_files_when_a_load_fails_and_we_do_not(
    temporary: Path, trained: MyModel, tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")
    file = zipped(trained.state_dict(), tmp_path)
    of_another_shape(file)
    options = {
        "device_map": {"": "cpu", "layers.0": "disk"},
        "offload_folder": tmp_path / "offload",
        "offload_state_dict": True,
    }
    with pytest.raises(ValueError, match="incorrect"):
        accelerate.load_checkpoint_in_model(MyModel(), str(file), **options)
    assert [path for path in temporary.rglob("*") if path.is_file()]
    assert list((tmp_path / "offload").rglob("*.dat"))
    before = listing(tmp_path)
    with pytest.raises(LoadError, match="shape mismatch"):
        load_checkpoint_in_model(MyModel(), file, **options)  # type: ignore[arg-type]  # a dict for both
    assert listing(tmp_path) == before


def test_layer_1_is_not_the_beginning_of_layer_10_as_it_is_to_transformers(
    trained: MyModel, tmp_path: Path
) -> None:
    device_map: dict[str, str] = {"layers.1": "disk", "": "cpu"}
    integration = pytest.importorskip("transformers.integrations.accelerate")
    theirs = integration.expand_device_map(
        device_map, [f"layers.{number}.up.weight" for number in (1, 10)]
    )
    assert theirs["layers.10.up.weight"] == "disk"
    with init_empty_weights():
        model = MyModel().eval()
    load_checkpoint_and_dispatch(model, zipped(trained.state_dict(), tmp_path), device_map)
    assert isinstance(model.get_parameter("layers.1.up.weight"), Paged)
    assert not isinstance(model.get_parameter("layers.10.up.weight"), Paged)
    assert torch.equal(model(INPUT), trained(INPUT))


@pytest.mark.usefixtures("temporary")
def test_what_is_compressed_is_expanded_once_and_leaves_no_file(
    trained: MyModel, tmp_path: Path
) -> None:
    zstandard = pytest.importorskip("zstandard")
    file = zipped(trained.state_dict(), tmp_path)
    packed = tmp_path / "model.bin.zst"
    packed.write_bytes(zstandard.ZstdCompressor().compress(file.read_bytes()))
    before = listing(tmp_path)
    with init_empty_weights():
        model = MyModel().eval()
    load_checkpoint_and_dispatch(
        model, packed, "auto", max_memory=ROOM, no_split_module_classes=["Block"]
    )
    assert torch.equal(model(INPUT), trained(INPUT))
    close(model)
    assert listing(tmp_path) == before


# Adapters of another library on top.


@pytest.fixture
def lora() -> Callable[[nn.Module], nn.Module]:
    peft = pytest.importorskip("peft")

    def wrapped(model: nn.Module) -> nn.Module:
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["up", "embed"], init_lora_weights=False)
        made: nn.Module = peft.get_peft_model(model, config).eval()
        return made

    return wrapped


def streaming(trained: MyModel, folder: Path) -> MyModel:
    with init_empty_weights():
        model = MyModel().eval()
    device_map = {"": "cpu"} | {f"layers.{number}": "disk" for number in range(6)}
    return load_checkpoint_and_dispatch(
        model, safe(trained.state_dict(), folder), device_map, ring=2
    )


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_peft_compute_on_top_of_streamed_weights(
    lora: Callable[[nn.Module], nn.Module], trained: MyModel, tmp_path: Path
) -> None:
    adapted, same = lora(streaming(trained, tmp_path)), lora(copy.deepcopy(trained))
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(adapted(INPUT), same(INPUT))
    assert not torch.equal(adapted(INPUT), trained(INPUT))
