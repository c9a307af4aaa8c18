"""Parse the paths that a user gives: local paths to read and to write, and an error for anything
else.

A location is examined before it becomes a `Path`: ``Path("s3://b/x")`` silently becomes
``s3:/b/x``.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from urllib.parse import unquote, urlsplit

from shardkit.errors import FormatError, PlanError
from shardkit.hints import Hint, option, output
from shardkit.printable import shown
from shardkit.sources import registry

_URL = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]+):/(?:/|(?!/))"
)  # two letters at least: C:/x is a path of Windows
_SCHEMES = (
    "abfs",
    "abfss",
    "az",
    "file",
    "ftp",
    "gcs",
    "gs",
    "hdfs",
    "hf",
    "http",
    "https",
    "r2",
    "s3",
    "s3a",
)
_HUB = ("huggingface.co", "www.huggingface.co", "hf.co")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_REPOSITORIES = {"datasets": "dataset", "spaces": "space"}
_VIEWS = ("blob", "resolve", "tree", "raw")
_OTHER_ENDINGS = (
    ".gguf",
    ".h5",
    ".hdf5",
    ".json",
    ".keras",
    ".msgpack",
    ".npy",
    ".npz",
    ".onnx",
    ".pdparams",
    ".tar",
    ".zip",
)
_PIPE = "-"


def to_read(location: str | os.PathLike[str]) -> Path:
    """The local path that *location* names.

    Raises:
        PlanError: it names none: it is empty, a URL, or the standard input.
        FormatError: no system has such a path.
    """
    text = _text(location, "the source")
    if text == _PIPE:
        raise PlanError(
            "'-' is the standard input, and a checkpoint is read at many offsets, not as a stream",
            hint="write it to a file, and give its name",
        )
    if "\0" in text:
        raise FormatError(Path(text), "is not a path: embedded null byte", hint="check the path")
    if scheme := _scheme(text):
        raise PlanError(
            f"{shown(text)} is a URL, and only local files and folders can be read",
            hint=_download(scheme, text),
        )
    return Path(text)


def to_write(location: str | os.PathLike[str], *, is_compressed: bool = False) -> Path:
    """The local path that *location* names: of a folder to make, or of one file whose ending says
    its format.

    Args:
        location: what the user gave.
        is_compressed: whether the output is to be compressed, and may end as such files do.

    Raises:
        PlanError: it names none, or a file of a format that is not written.
    """
    text = _text(location, "the output")
    if text == _PIPE:
        raise PlanError(
            "'-' is the standard output, and a checkpoint is written as files",
            hint=("name a folder, as in ", output("shards")),
        )
    if scheme := _scheme(text):
        raise PlanError(
            f"{shown(text)} is a URL, and only local files and folders can be written",
            hint=_upload(scheme, text),
        )
    path = Path(text)
    if path.name in ("", ".."):
        path = path.resolve()
    if path == path.parent:
        raise PlanError(
            f"{shown(text)} is the root of a file system, and cannot be replaced",
            hint="name a folder in it",
        )
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass  # what is in the way of making it, the writer tells
    except (OSError, ValueError) as error:  # a ValueError of a zero byte
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise PlanError(
            f"{shown(text)} cannot be examined: {reason}", hint="choose another output"
        ) from None
    if not (os.path.isdir(path) or text.endswith(tuple(filter(None, (os.sep, os.altsep))))):
        _refuse_ending(path, is_compressed=is_compressed)
    return path


def looked_for(path: Path) -> str | None:
    """A hint on *path*, which is not there: what else it may have been meant to be."""
    text = path.as_posix()
    if text.startswith("~") and (home := path.expanduser()).exists():
        return (
            f"a shell reads ~ as your home folder, Python does not: give {shlex.quote(str(home))}"
        )
    if not _HUB_NAME.fullmatch(text) or text.startswith("."):
        return None
    cached = _cached(text)
    if cached is not None:
        return f"it is in the cache of the Hugging Face Hub: give {shlex.quote(str(cached))}"
    if _is_called_local(path):
        return None
    return (
        f"if it is a model of the Hugging Face Hub: hf download {text}, and give the folder "
        "that this prints"
    )


def _is_called_local(path: Path) -> bool:
    """Whether *path*, of two steps, is rather a mistyped file than a model of the Hub."""
    endings = (*registry.suffixes(), *registry.codec_suffixes(), *_OTHER_ENDINGS)
    return path.parent.is_dir() or path.name.startswith(".") or path.name.endswith(tuple(endings))


def _text(location: str | os.PathLike[str], what: str) -> str:
    text = os.fspath(location)
    if not text:
        raise PlanError(
            f"{what} is an empty path",
            hint="name a file or a folder; in a shell, a variable may be unset",
        )
    return text


def _scheme(text: str) -> str | None:
    """The scheme of the URL *text*, also where `Path` has made one of its two slashes; None for a
    path.
    """
    found = _URL.match(text)
    if found is None or os.path.lexists(text):
        return None
    scheme = found[1].lower()
    return scheme if text.startswith(f"{found[1]}://") or scheme in _SCHEMES else None


def _download(scheme: str, url: str) -> str:
    url = _whole(url)
    parts = urlsplit(url)
    if scheme == "hf":
        return (
            f"download it: {_hub_command([parts.netloc, *parts.path.split('/')])}, and give "
            "the folder that this prints"
        )
    if scheme in ("http", "https") and parts.netloc in _HUB:
        return (
            f"download it: {_hub_command(parts.path.split('/'))}, and give the path that this "
            "prints"
        )
    if scheme == "file":
        return f"give its path: {shlex.quote(unquote(parts.path))}"
    name = Path(parts.path).name or parts.netloc or "checkpoint"
    target, quoted = shlex.quote(name), shlex.quote(url)
    whole = "" if Path(name).suffix else " --recursive"
    commands = {
        "s3": f"aws s3 cp{whole} {quoted} {target}",
        "gs": f"gcloud storage cp --recursive {quoted} .",
        "http": f"curl -L -o {target} {quoted}",
        "https": f"curl -L -o {target} {quoted}",
    }
    if scheme not in commands:
        return "download it, and give its local path"
    return f"download it: {commands[scheme]}, and give {target}"


def _upload(scheme: str, url: str) -> Hint:
    url = _whole(url)
    parts = urlsplit(url)
    name = Path(parts.path).name or "shards"
    target, quoted = shlex.quote(name), shlex.quote(url)
    commands = {
        "hf": f"hf upload {shlex.quote(f'{parts.netloc}{parts.path}')} {target}",
        "s3": f"aws s3 cp --recursive {target} {quoted}",
        "gs": f"gcloud storage cp --recursive {target} {quoted}",
    }
    if scheme == "file":
        return ("give its path: ", output(unquote(parts.path)))
    if scheme not in commands:
        return ("write it to a folder, as in ", output(name), ", and upload that")
    return ("write it to a folder, as in ", output(name), f", and upload that: {commands[scheme]}")


def _whole(url: str) -> str:
    """*url* with both of its slashes."""
    scheme, _, rest = url.partition(":")
    return (
        f"{scheme.lower()}://{rest.lstrip('/')}"
        if scheme.lower() != "file"
        else f"file:///{rest.lstrip('/')}"
    )


def _hub_command(steps: list[str]) -> str:
    """The command that downloads what a URL of the Hub with these *steps* names."""
    steps = [step for step in steps if step]
    kind = _REPOSITORIES.get(steps[0]) if steps else None
    if kind:
        steps = steps[1:]
    owner, name, *rest = [*steps, *("ORG", "NAME")[len(steps) :]] if len(steps) < 2 else steps
    name, _, revision = name.partition("@")
    viewed = ""
    if rest and rest[0] in _VIEWS:
        viewed, revision = rest[0], rest[1] if len(rest) > 1 else ""
        rest = rest[2:]
    command = ["hf", "download", f"{owner}/{name}"]
    if rest and viewed != "tree":
        command.append("/".join(rest))
    elif rest:
        command += ["--include", f"{'/'.join(rest)}/*"]
    if kind:
        command += ["--repo-type", kind]
    if revision and revision != "main":
        command += ["--revision", revision]
    return shlex.join(command)


def _cached(name: str) -> Path | None:
    """The newest snapshot of the model *name* in the cache of the Hub, if there is one."""
    home = Path(
        os.environ.get("HF_HOME")
        or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    )
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    model = hub / f"models--{name.replace('/', '--')}"
    try:
        snapshot = (
            model / "snapshots" / (model / "refs" / "main").read_text(encoding="ascii").strip()
        )
        return snapshot if snapshot.is_dir() else None
    except (OSError, ValueError):
        return None


def _refuse_ending(path: Path, *, is_compressed: bool) -> None:
    """Raise PlanError where *path* ends like a file of a format that is not written."""
    codecs = registry.codec_suffixes()
    stem = path.with_suffix("") if path.suffix in codecs else path
    if registry.writer_for(stem.suffix) and (is_compressed or stem == path):
        return
    if registry.writer_for(stem.suffix):
        hint = ("compress it with ", option("compress", "zstd"))
        raise PlanError(f"{shown(str(path))} is named like a compressed file", hint=hint)
    known = {Path(f"x{ending}").suffix for ending in (*registry.suffixes(), *_OTHER_ENDINGS)}
    if path.suffix.lower() in known:
        folder = str(path.with_suffix(""))
        raise PlanError(
            (f"{shown(str(path))} is named like a {path.suffix} file, which shardkit cannot write"),
            hint=(
                output(folder),
                " makes a folder of shards, ",
                output(f"{folder}.safetensors"),
                " one file",
            ),
        )
