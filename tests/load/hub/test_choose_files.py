"""The files that are chosen from a listing are those that the libraries themselves would take.

The listings are shaped like repositories on the Hub. What a library takes is asked of its own code,
to which a fake Hub answers.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardkit.errors import LoadError
from shardkit.load.hub import choose_files
from shardkit.load.hub.choose_files import Choice, Wanted, choose

REPO = "org/name"
FOLDER = Path(__file__).with_name("listings")
KINDS = (None, True, False)
SHARD = re.compile(r"(.*)-\d{5}-of-\d{5}(.*)")


@dataclass(frozen=True)
class Listing:
    """A repository: the names of its files, and the content of those that are not weights."""

    names: frozenset[str]
    files: dict[str, object]
    asked: list[str] = field(default_factory=list)

    def read(self, name: str) -> bytes:
        self.asked.append(name)
        content = self.files.get(name)
        if content is None and ".index" in name:
            content = {"metadata": {}, "weight_map": {each: each for each in self.shards(name)}}
        return content if isinstance(content, bytes) else json.dumps(content).encode()

    def shards(self, index: str) -> Iterator[str]:
        """The names, in the folder of *index*, of the files that it lists."""
        folder, _, base = index.rpartition("/")
        for name in sorted(self.names):
            there, _, file = name.rpartition("/")
            if there == folder and (match := SHARD.fullmatch(file)):
                stem, dot, word = match[1].partition(".")
                *older, suffix = match[2][1:].split(".")
                new = f"{stem}.{suffix}.index{dot}{word}.json"
                if base == (f"{stem}.{suffix}.{older[0]}.index.json" if older else new):
                    yield file


def listing(name: str) -> Listing:
    found = json.loads((FOLDER / f"{name}.json").read_text())
    return Listing(frozenset(found["names"]), found["files"])


ALL = {path.stem: listing(path.stem) for path in sorted(FOLDER.glob("*.json"))}
PIPELINES = [name for name, each in ALL.items() if "model_index.json" in each.names]
DIFFUSERS = [
    name
    for name, each in ALL.items()
    if name not in PIPELINES and "_class_name" in str(each.files.get("config.json"))
]
TRANSFORMERS = [
    name
    for name, each in ALL.items()
    if "config.json" in each.names and name not in (*PIPELINES, *DIFFUSERS, "adapter")
]


def chosen(found: Listing, wanted: Wanted) -> Choice | None:
    """What is chosen; None if there is nothing to choose."""
    try:
        return choose(REPO, found.names, found.read, wanted)
    except LoadError:
        return None


def files(choice: Choice | None) -> set[str] | None:
    return None if choice is None else {*choice.weights, *choice.others}


# What the libraries choose ------------------------------------------------------------------------


class Stop(BaseException):
    """The library has chosen, and would download now."""


class Hub:
    """A repository that is asked for files by the functions of huggingface_hub."""

    def __init__(self, found: Listing, folder: Path) -> None:
        self.found, self.folder = found, folder
        self.hits: list[str] = []
        self.patterns: tuple[list[str], list[str]] | None = None

    def file(self, repo: str, name: str, subfolder: str = "", **_: object) -> str | None:
        name = f"{subfolder}/{name}" if subfolder else name
        if name not in self.found.names:
            return None
        self.hits.append(name)
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.found.read(name) if name.endswith(".json") else b"")
        return str(path)

    def shards(
        self, repo: str, names: Collection[str], subfolder: str = "", **_: object
    ) -> list[str]:
        return [str(self.file(repo, name, subfolder)) for name in names]

    def existing(self, repo: str, weights_name: str = "", **options: Any) -> str:
        subfolder = options.get("subfolder") or ""
        if (path := self.file(repo, weights_name, subfolder)) is None:
            raise OSError(f"no {weights_name}")
        return path

    def info(self, *_: object, **__: object) -> Any:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=n) for n in self.found.names])

    def snapshot(self, *_: object, **options: Any) -> str:
        self.patterns = options["allow_patterns"], options["ignore_patterns"]
        return str(self.folder)

    def downloaded(self) -> set[str]:
        utils: Any = import_module("huggingface_hub.utils")
        assert self.patterns is not None
        allowed, ignored = self.patterns
        return set(
            utils.filter_repo_objects(
                sorted(self.found.names), allow_patterns=allowed, ignore_patterns=ignored
            )
        )


def transformers_takes(
    found: Listing, wanted: Wanted, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> set[str] | None:
    """The weights and their index that Transformers takes."""
    hub = Hub(found, folder)
    from transformers import modeling_utils
    from transformers.utils import hub as hub_functions

    monkeypatch.setattr(modeling_utils, "cached_file", hub.file)
    monkeypatch.setattr(modeling_utils, "has_file", lambda _, name, **__: name in found.names)
    monkeypatch.setattr(hub_functions, "cached_files", hub.shards)
    inside = f"{wanted.subfolder}/" if wanted.subfolder else ""
    config: Any = found.files.get(f"{inside}config.json")
    download: Any = {"subfolder": wanted.subfolder}
    try:
        modeling_utils._get_resolved_checkpoint_files(
            REPO,
            variant=wanted.variant,
            gguf_file=None,
            use_safetensors=wanted.use_safetensors,
            user_agent=None,
            is_remote_code=True,  # or else a bot is asked to convert the weights
            transformers_explicit_filename=config.get("transformers_weights"),
            download_kwargs=download,
        )
    except OSError:
        return None
    return set(hub.hits)


def diffusers_takes(
    found: Listing, wanted: Wanted, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> set[str] | None:
    """The weights and their index that a model of Diffusers takes."""
    import diffusers
    from diffusers.models import model_loading_utils, modeling_utils
    from diffusers.utils import hub_utils

    hub = Hub(found, folder)
    kind: Any = diffusers.UNet2DModel

    def stop(*_: object, **__: object) -> None:
        raise Stop

    def snapshot(*_: object, **options: Any) -> None:
        hub.snapshot(**options)
        hub.hits += hub.downloaded()
        raise Stop

    for module in (modeling_utils, model_loading_utils):
        monkeypatch.setattr(module, "_get_model_file", hub.existing)
    monkeypatch.setattr(modeling_utils, "_resolve_revision", lambda *_, **__: "main")
    monkeypatch.setattr(hub_utils, "model_info", hub.info)
    monkeypatch.setattr(hub_utils, "snapshot_download", snapshot)
    monkeypatch.setattr(kind, "load_config", lambda *_, **__: ({}, {}, "commit"))
    monkeypatch.setattr(kind, "from_config", stop)
    options: Any = {"variant": wanted.variant, "use_safetensors": wanted.use_safetensors}
    try:
        kind.from_pretrained(REPO, **options)
    except Stop:
        return set(hub.hits)
    except OSError:
        return None
    raise AssertionError("the model was made")


class OnnxPipeline:
    _is_onnx = True
    _load_connected_pipes = False

    def __init__(
        self,
        vae_encoder: object,
        vae_decoder: object,
        text_encoder: object,
        tokenizer: object,
        unet: object,
        scheduler: object,
        safety_checker: object,
        feature_extractor: object,
    ) -> None: ...


def pipeline_takes(
    found: Listing, wanted: Wanted, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> set[str] | None:
    """The files that Diffusers downloads for a pipeline."""
    from diffusers import DiffusionPipeline
    from diffusers.pipelines import pipeline_utils

    hub = Hub(found, folder)
    monkeypatch.setattr(pipeline_utils, "model_info", hub.info)
    monkeypatch.setattr(pipeline_utils, "hf_hub_download", hub.file)
    monkeypatch.setattr(pipeline_utils, "snapshot_download", hub.snapshot)
    monkeypatch.setattr(pipeline_utils, "_resolve_revision", lambda *_, **__: "main")
    options: Any = {"variant": wanted.variant, "use_safetensors": wanted.use_safetensors}
    if "Onnx" in str(found.files["model_index.json"]):  # whose classes need onnxruntime
        monkeypatch.setattr(pipeline_utils, "_get_pipeline_class", lambda *_, **__: OnnxPipeline)
    try:
        DiffusionPipeline.download(REPO, **options, **dict.fromkeys(wanted.given))
    except (OSError, ValueError):
        return None
    except ImportError:  # after the choice
        assert hub.patterns
    return hub.downloaded()


needs_diffusers = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def transformers() -> Any:
    found = pytest.importorskip("transformers", reason="its choice is compared")
    if not found.__version__.startswith("5."):
        pytest.skip("from_pretrained needs Transformers 5")
    return found


@pytest.fixture
def diffusers(transformers: Any) -> Any:
    pytest.importorskip("torch", reason="Diffusers has no models without it")
    return pytest.importorskip("diffusers", reason="its choice is compared")


@pytest.mark.parametrize("use_safetensors", KINDS)
@pytest.mark.parametrize("variant", [None, "fp16", "bf16"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_model_has_the_weights_that_transformers_takes(
    name: str,
    variant: str | None,
    use_safetensors: bool | None,
    transformers: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for subfolder in ("", "text", "vision") if name == "subfolders" else ("",):
        found, wanted = ALL[name], Wanted(subfolder, variant, use_safetensors)
        theirs = transformers_takes(found, wanted, tmp_path, monkeypatch)
        ours = chosen(found, wanted)
        if ours is None or theirs is None:
            assert (ours is None) == (theirs is None)
            continue
        extra = {"head.safetensors"} & found.names  # which it takes afterwards
        assert {*ours.weights} | {n for n in ours.others if ".index." in n} == theirs | extra
        assert ours.kind == "transformers"


@needs_diffusers
@pytest.mark.parametrize("use_safetensors", KINDS)
@pytest.mark.parametrize("variant", [None, "fp16", "bf16"])
@pytest.mark.parametrize("name", DIFFUSERS)
def test_a_model_has_the_weights_that_diffusers_takes(
    name: str,
    variant: str | None,
    use_safetensors: bool | None,
    diffusers: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, wanted = ALL[name], Wanted("", variant, use_safetensors)
    theirs = diffusers_takes(found, wanted, tmp_path, monkeypatch)
    ours = chosen(found, wanted)
    if theirs is None and use_safetensors is None and any(".bin.index" in n for n in found.names):
        return  # only Diffusers insists on use_safetensors=False for torch files in shards
    assert files(ours) == (None if theirs is None else theirs | {"config.json"})
    assert ours is None or ours.kind == "diffusers"


def components(found: Listing) -> dict[str, object]:
    index: Any = found.files["model_index.json"]
    return {
        name: value for name, value in index.items() if name[0] != "_" and value.__class__ is list
    }


def can_load(names: Collection[str], folder: str, variant: str | None) -> bool:
    """Whether the libraries find weights in *folder*; only Diffusers knows the older spelling."""
    word, diffusers = (rf"(\.{variant})?" if variant else ""), "diffusion_pytorch_model"
    entry = re.compile(
        rf"(model{word}|{diffusers}{word})\.safetensors|(pytorch_model{word}|{diffusers}{word})\.bin"
        rf"|(model\.safetensors|pytorch_model\.bin)\.index{word}\.json"
        rf"|{diffusers}\.(safetensors|bin)(\.index{word}|{word}\.index)\.json"
    )
    return any(folder_of(n) == folder and entry.fullmatch(n.rpartition("/")[2]) for n in names)


def lacking(found: Listing, theirs: Collection[str], wanted: Wanted) -> set[str]:
    """The folders of components of which Diffusers loads no weights, although there are some."""
    loaded = {name for name, value in components(found).items() if value != [None, None]}
    folders = set(map(folder_of, found.names))
    places = {name if name in folders else "" for name in loaded - wanted.given}
    able = {place for place in places if can_load(found.names, place, wanted.variant)}
    return {place for place in able if not can_load(theirs, place, wanted.variant)}


def folder_of(name: str) -> str:
    return name.rpartition("/")[0]


def is_idle_index(name: str, theirs: Collection[str]) -> bool:
    """Whether *name* is an index in the older spelling, of a kind that Diffusers leaves out."""
    match = re.fullmatch(r"(.*/)?\w+(\.safetensors|\.bin)\.\w+\.index\.json", name)
    return match is not None and not any(
        folder_of(each) == folder_of(name) and each.endswith(match[2]) for each in theirs
    )


def compare(found: Listing, wanted: Wanted, theirs: set[str] | None) -> None:
    """See that what is chosen is what Diffusers takes, but for the rules of the module."""
    if theirs is not None and not wanted.trusted:
        theirs = {name for name in theirs if not name.endswith(".py")}
    if theirs is not None:
        theirs -= {name for name in theirs if is_idle_index(name, theirs)}
    choice = chosen(found, wanted)
    ours = files(choice)
    missing = set() if theirs is None else lacking(found, theirs, wanted)
    if wanted.use_safetensors is not None:
        missing -= {""}  # where a tokenizer may be, which has no weights
    if missing and wanted.use_safetensors is not None:
        assert ours is None  # Diffusers would find out after the download
    elif missing:
        assert theirs is not None
        assert ours is not None
        assert theirs < ours
        assert {*map(folder_of, ours - theirs)} == missing
    else:
        assert ours == theirs
    assert choice is None or choice.kind == "pipeline"


@needs_diffusers
@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("use_safetensors", KINDS)
@pytest.mark.parametrize("variant", [None, "fp16", "non_ema"])
@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_has_the_files_that_diffusers_downloads(
    name: str,
    variant: str | None,
    use_safetensors: bool | None,
    trusted: bool,
    diffusers: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = Wanted("", variant, use_safetensors, trusted)
    theirs = pipeline_takes(ALL[name], wanted, tmp_path, monkeypatch)
    compare(ALL[name], wanted, theirs)


@needs_diffusers
@pytest.mark.parametrize("use_safetensors", KINDS)
@pytest.mark.parametrize("name", PIPELINES)
def test_components_that_are_passed_are_left_out_as_diffusers_does(
    name: str,
    use_safetensors: bool | None,
    diffusers: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = ALL[name]
    for count in (1, 2):
        for passed in combinations(sorted(components(found)), count):
            wanted = Wanted("", None, use_safetensors, given=frozenset(passed))
            theirs = pipeline_takes(found, wanted, tmp_path, monkeypatch)
            compare(found, wanted, theirs)


STEMS = {
    "text_encoder": ("model", "pytorch_model"),
    "transformer": ("diffusion_pytorch_model",) * 2,
    "vae": ("diffusion_pytorch_model",) * 2,
}


@st.composite
def repositories(draw: st.DrawFn) -> Listing:
    """A pipeline whose components have weights of any kinds, variants and spellings."""
    names = {"model_index.json", "scheduler/scheduler_config.json", "tokenizer/spiece.model"}
    for component, (safe, torch) in STEMS.items():
        names.add(f"{component}/config.json")
        for word in ("", ".fp16"):
            for suffix, stem in (("safetensors", safe), ("bin", torch)):
                index = f"{stem}.{suffix}.index{word}.json"
                old = f"{stem}.{suffix}{word}.index.json"
                spellings = {
                    "none": [],
                    "one": [f"{stem}{word}.{suffix}"],
                    "shards": [f"{stem}{word}-{n}.{suffix}" for n in TWO] + [index],
                    "older": [f"{stem}-{n}{word}.{suffix}" for n in TWO] + [old if word else index],
                }
                how = draw(st.sampled_from(sorted(spellings)))
                names |= {f"{component}/{name}" for name in spellings[how]}
    return Listing(frozenset(names), {"model_index.json": ALL["pixart"].files["model_index.json"]})


TWO = ("00001-of-00002", "00002-of-00002")


@needs_diffusers
@settings(
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    found=repositories(),
    variant=st.sampled_from([None, "fp16"]),
    use_safetensors=st.sampled_from(KINDS),
    passed=st.frozensets(st.sampled_from([*STEMS, "tokenizer"]), max_size=2),
)
def test_whatever_a_pipeline_consists_of_diffusers_chooses_alike(
    found: Listing,
    variant: str | None,
    use_safetensors: bool | None,
    passed: frozenset[str],
    diffusers: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    wanted = Wanted("", variant, use_safetensors, given=passed)
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("hub")
        compare(found, wanted, pipeline_takes(found, wanted, folder, monkeypatch))


@needs_diffusers
def test_a_pipeline_in_a_folder_is_chosen_as_one_at_the_root(
    diffusers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ALL["pipeline_in_folder"]
    start = "pipe/"
    inside = Listing(
        frozenset(name.removeprefix(start) for name in found.names if name.startswith(start)),
        {name.removeprefix(start): each for name, each in found.files.items()},
    )
    theirs = pipeline_takes(inside, Wanted(), tmp_path, monkeypatch)
    assert theirs is not None
    assert files(chosen(found, Wanted("pipe"))) == {start + name for name in theirs}


def test_an_onnx_pipeline_is_told_by_the_name_of_its_class(diffusers: Any) -> None:
    source = Path(diffusers.__file__).parent / "pipelines"
    classes = (
        re.findall(r"^class (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        for path in source.rglob("*.py")
        if "_is_onnx = True" in path.read_text(encoding="utf-8")
    )
    found = [name for names in classes for name in names if "Pipeline" in name]
    assert found
    assert all("Onnx" in name for name in found)
    assert not [
        name
        for name in dir(diffusers)
        if "Onnx" in name and "Pipeline" in name and name not in found
    ]


def test_the_names_of_weights_are_those_that_are_loaded() -> None:
    pytest.importorskip("torch", reason="the loaders need it")
    from shardkit.load.libraries import diffusers_model, transformers_model

    assert choose_files._TRANSFORMERS == transformers_model._WEIGHTS
    assert choose_files._DIFFUSERS == diffusers_model._WEIGHTS


# What stands beside the weights -------------------------------------------------------------------


TOKENIZER = {"special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"}
SLOW = {"special_tokens_map.json", "tokenizer.model", "tokenizer_config.json"}
CODE = {
    "configuration_baichuan.py",
    "handler/serve.py",
    "modeling_baichuan.py",
    "quantizer.py",
    "tokenization_baichuan.py",
}
BESIDE: dict[tuple[str, bool], set[str]] = {
    ("t0pp", False): {"spiece.model", *TOKENIZER},
    ("sharded_twins", False): {
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.model",
        *TOKENIZER,
    },
    ("llama", False): {"generation_config.json", "model.safetensors.index.json", *TOKENIZER},
    ("gpt2", False): {
        "generation_config.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    },
    ("bert_txt", False): {"tokenizer.json", "tokenizer_config.json", "vocab.txt"},
    ("custom_code", False): {"generation_config.json", "pytorch_model.bin.index.json", *SLOW},
    ("custom_code", True): {"generation_config.json", "pytorch_model.bin.index.json", *SLOW, *CODE},
    ("chat_templates", False): {
        "additional_chat_templates/rag.jinja",
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "processor_config.json",
        "qwen.tiktoken",
        "source.spm",
        "video_preprocessor_config.json",
    },
    ("transformer_sharded", True): {
        "diffusion_pytorch_model.safetensors.index.json",
        "modeling_own.py",
    },
    ("vae_model", False): set(),
}


@pytest.mark.parametrize(("name", "trusted"), BESIDE)
def test_configurations_and_tokenizers_are_chosen_and_nothing_else(
    name: str, trusted: bool
) -> None:
    choice = chosen(ALL[name], Wanted(trusted=trusted))
    assert choice is not None
    assert {*choice.others} == {"config.json", *BESIDE[name, trusted]}


@pytest.mark.parametrize(
    ("name", "wanted", "asked"),
    [
        ("gpt2", Wanted(), ["config.json"]),
        ("llama", Wanted(), ["config.json", "model.safetensors.index.json"]),
        ("subfolders", Wanted("text/"), ["text/config.json", "text/model.safetensors.index.json"]),
        ("sdxl", Wanted(), ["model_index.json"]),
        (
            "flux",
            Wanted(),
            [
                "model_index.json",
                "text_encoder_2/model.safetensors.index.json",
                "transformer/diffusion_pytorch_model.safetensors.index.json",
            ],
        ),
        ("flux", Wanted(given=frozenset({"text_encoder_2", "transformer"})), ["model_index.json"]),
    ],
)
def test_few_files_are_read(name: str, wanted: Wanted, asked: list[str]) -> None:
    found = listing(name)
    assert chosen(found, wanted)
    assert sorted(found.asked) == asked


def test_optional_components_that_are_passed_are_left_out_too() -> None:
    index = {**components(ALL["sdxl"]), "image_encoder": ["transformers", "CLIPVisionModel"]}
    encoder = {"image_encoder/config.json", "image_encoder/model.safetensors"}
    found = Listing(ALL["sdxl"].names | encoder, {"model_index.json": index})
    for given_, has in ((frozenset[str](), encoder), (frozenset({"image_encoder"}), set[str]())):
        names = files(chosen(found, Wanted(given=given_)))
        assert names is not None
        assert names & encoder == has


def test_a_component_that_would_have_no_weights_has_those_that_there_are() -> None:
    choice = chosen(ALL["sd_mixed"], Wanted())
    assert choice is not None
    assert {name for name in choice.weights if name.endswith(".safetensors")} == {
        "unet/diffusion_pytorch_model.safetensors"
    }
    assert "safety_checker/pytorch_model.bin" in choice.weights


def test_the_module_imports_no_library() -> None:
    code = (
        "import sys, shardkit.load.hub.choose_files;"
        "print({'torch', 'transformers', 'diffusers', 'huggingface_hub'} & {*sys.modules})"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


# What is refused ----------------------------------------------------------------------------------


def simple(config: object = None, index: object = None, names: Collection[str] = ()) -> Listing:
    there = {"config.json", "model.safetensors.index.json", "a.safetensors", *names}
    configured = {} if config is None else config
    return Listing(
        frozenset(there), {"config.json": configured, "model.safetensors.index.json": index}
    )


def mapped(file: object) -> Listing:
    return simple(index={"weight_map": {"weight": file}}, names=["b/c.safetensors"])


@pytest.mark.parametrize(
    ("found", "wanted", "says"),
    [
        (
            ALL["gguf_alone"],
            Wanted(),
            r"neither config\.json nor model_index\.json.*Q4.*GGUF files",
        ),
        (ALL["gguf_only"], Wanted(), r"no weights under.*GGUF files"),
        (ALL["onnx_alone"], Wanted(), r"neither config.*ONNX files"),
        (ALL["adapter"], Wanted(), r"holds an adapter"),
        (
            Listing(frozenset({"original/consolidated.00.pth"}), {}),
            Wanted(),
            r"neither config.*original weights",
        ),
        (Listing(frozenset({"my_lora.safetensors"}), {}), Wanted(), r"neither config.*an adapter"),
        (Listing(frozenset(), {}), Wanted(), r"no files"),
        (ALL["subfolders"], Wanted("audio"), r"/audio has neither.*no files"),
        (ALL["t0pp"], Wanted(use_safetensors=True), r"no weights.*'pytorch_model\.bin'"),
        (ALL["t0pp"], Wanted(variant="fp16"), r"'model\.fp16\.safetensors'.*'pytorch_model\.bin'"),
        (ALL["sd_bin"], Wanted(use_safetensors=True), r"no weights in safetensors.*'.*\.bin'"),
        (ALL["sd_bin"], Wanted(variant="fp16"), r"no weights of the variant 'fp16'"),
        (ALL["flux"], Wanted(use_safetensors=False), r"use_safetensors asks for"),
        (simple(b"[1]"), Wanted(), r"config\.json must hold an object, found a list of 1"),
        (simple(b"{"), Wanted(), r"config\.json is not JSON"),
        (simple(b"\xff\xfe\xff"), Wanted(), r"config\.json is not JSON"),
        (simple(b"[" * 100_000), Wanted(), r"config\.json is not JSON"),
        (simple(index=b"{"), Wanted(), r"model\.safetensors\.index\.json"),
        (simple(index=[1]), Wanted(), r"must be an object"),
        (simple(index={"weight_map": {}}), Wanted(), r"weight_map must name a file"),
        (simple(index={"weight_map": {"a": 1}}), Wanted(), r"must be a name"),
        (mapped("z.safetensors"), Wanted(), r"names files that are not in.*'z\.safetensors'"),
        (mapped("../a.safetensors"), Wanted(), r"leads out of the folder"),
        (mapped("/a.safetensors"), Wanted(), r"absolute path"),
        (mapped("C:/a.safetensors"), Wanted(), r"absolute path"),
        (mapped("b\\c.safetensors"), Wanted(), r"backslash"),
        (simple({"transformers_weights": "z.safetensors"}), Wanted(), r"not in the repository"),
        (simple({"transformers_weights": "../a.safetensors"}), Wanted(), r"leads out"),
        (simple({"transformers_weights": "config.json"}), Wanted(), r"neither a safetensors file"),
    ],
)
def test_a_repository_is_refused_with_a_sentence(found: Listing, wanted: Wanted, says: str) -> None:
    with pytest.raises(LoadError, match=f"^{REPO}.*{says}") as raised:
        choose(REPO, found.names, found.read, wanted)
    assert raised.value.hint


def test_the_hint_names_the_folders_that_have_a_model() -> None:
    with pytest.raises(LoadError) as raised:
        choose(REPO, ["unet/config.json"], lambda _: b"{}", Wanted())
    assert "subfolder" in str(raised.value.hint)
    assert "'unet'" in str(raised.value.hint)


def test_weights_in_a_folder_below_their_index_are_chosen() -> None:
    choice = chosen(mapped("b/c.safetensors"), Wanted())
    assert choice is not None
    assert choice.weights == ("b/c.safetensors",)


def test_a_pipeline_whose_index_names_other_files_is_refused_before_the_download() -> None:
    found = listing("flux")
    found.files["transformer/diffusion_pytorch_model.safetensors.index.json"] = {
        "weight_map": {"weight": "diffusion_pytorch_model-00001-of-00009.safetensors"}
    }
    with pytest.raises(LoadError, match="of-00009"):
        choose(REPO, found.names, found.read, Wanted())
