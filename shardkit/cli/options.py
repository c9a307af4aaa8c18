"""The options that commands share, and how their values are parsed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import wraps
from typing import TYPE_CHECKING, TypeVar

import click

from shardkit.cli import completion
from shardkit.dtypes import DType, parse_dtype
from shardkit.errors import ShardkitError
from shardkit.limits import Limits
from shardkit.sizes import parse_size

if TYPE_CHECKING:
    from shardkit.checkpoint.edits import Ties
    from shardkit.fleet.parts import Part
    from shardkit.fleet.ray_cluster import RayCluster

Command = TypeVar("Command", bound=Callable[..., object])
Parsed = TypeVar("Parsed")
Option = Callable[[Callable[..., object]], Callable[..., object]]

_NAMES = [field.name for field in fields(Limits)]


def path_argument(name: str, shown: str) -> Callable[[Command], Command]:
    """An argument that is a path, as it was written: what it names is found out by reading it, and
    the shell completes it.
    """
    return click.argument(name, metavar=shown, type=click.Path())


def edit_options(command: Callable[..., object]) -> Callable[..., object]:
    """What changes on the way from source to output, from --root to --ties; the command gets it as
    *edits*.
    """

    @wraps(command)
    def gathered(
        *args: object,
        root: str | None,
        include: tuple[str, ...],
        exclude: tuple[str, ...],
        rename: tuple[tuple[str, str], ...],
        dtype: DType | None,
        ties: Ties,
        **others: object,
    ) -> object:
        from shardkit.checkpoint.edits import Edits

        return command(*args, edits=Edits(root, include, exclude, rename, dtype, ties), **others)

    return _with(_EDITS, gathered)


def parse_limits(
    context: click.Context, parameter: click.Parameter, words: tuple[str, ...]
) -> Limits:
    """The limits that several ``NAME=VALUE`` give, the others as they are."""
    raised = {}
    for word in words:
        name, equals, number = word.partition("=")
        if not equals or name not in _NAMES:
            raise click.BadParameter(
                f"{word!r} must be NAME=VALUE, and NAME one of {', '.join(_NAMES)}"
            )
        raised[name] = _or_usage(parse_size, number)
    return Limits(**raised)


def parse_shard_size(context: click.Context, parameter: click.Parameter, word: str) -> int | None:
    """The size that *word* says; None for "none"."""
    return None if word.lower() == "none" else _or_usage(parse_size, word)


def parse_renames(
    context: click.Context, parameter: click.Parameter, words: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    """The pairs that several ``REGEX=REPL`` give."""
    return tuple(map(split_rename, words))


def split_rename(word: str) -> tuple[str, str]:
    """*word* split at the first ``=`` with a whole regular expression before it, so that
    ``(?=x)y=z`` means ``(?=x)y``.

    Raises:
        click.BadParameter: there is none.
    """
    for match in re.finditer("=", word):
        pattern, replacement = word[: match.start()], word[match.end() :]
        if pattern and _compiles(pattern):
            return pattern, replacement
    raise click.BadParameter(
        f"{word!r} must be REGEX=REPL with a valid regular expression, as in '^module\\.=' or "
        "'gamma$=weight'"
    )


def parse_type(
    context: click.Context, parameter: click.Parameter, word: str | None
) -> DType | None:
    """The floating-point type that *word* names."""
    return None if word is None else _or_usage(parse_dtype, word)


def parse_pattern(
    context: click.Context, parameter: click.Parameter, word: str | None
) -> re.Pattern[str] | None:
    """The regular expression *word*."""
    try:
        return None if word is None else re.compile(word)
    except re.error as error:
        raise click.BadParameter(f"{word!r} is not a regular expression: {error}") from None


def writing_options(command: Callable[..., object]) -> Callable[..., object]:
    """How the source is read and the output laid out, which the command gets as *terms*, and how it
    is written, as *writing*.
    """

    @wraps(command)
    def gathered(
        *args: object,
        max_shard: int | None,
        format: str | None,  # noqa: A002 - the word of the command line
        no_companions: bool,
        checksum: str | None,
        compress: str | None,
        limits: Limits,
        jobs: int | None,
        limit_rate: int | None,
        part: Part | None,
        executor: str | None,
        address: str | None,
        per_node: int | None,
        no_fsync: bool,
        dry_run: bool,
        overwrite: bool,
        as_json: bool,
        quiet: bool,
        **others: object,
    ) -> object:
        from shardkit.cli.run_conversion import Writing
        from shardkit.planning.options import ConversionOptions

        terms = ConversionOptions(max_shard, format, not no_companions, checksum, compress, limits)
        if part is not None and (dry_run or no_fsync):
            other = "--dry-run" if dry_run else "--no-fsync"
            raise click.UsageError(f"--part and {other} exclude each other: remove one of them")
        cluster = _cluster(executor, address, per_node, limit_rate)
        writing = Writing(
            jobs, not no_fsync, limit_rate, part, cluster, dry_run, overwrite, as_json, quiet
        )
        return command(*args, terms=terms, writing=writing, **others)

    return _with(_WRITING, gathered)


def parse_rate(context: click.Context, parameter: click.Parameter, word: str | None) -> int | None:
    """The bytes in a second that *word* says."""
    if word is None:
        return None
    from shardkit.operations.convert import parse_rate

    return _or_usage(parse_rate, word)


def parse_part(context: click.Context, parameter: click.Parameter, word: str | None) -> Part | None:
    """The part that *word* says."""
    if word is None:
        return None
    from shardkit.fleet.parts import Part

    return _or_usage(Part.parse, word)


def executor_options(command: Callable[..., object]) -> Callable[..., object]:
    """The cluster that does the work, which the command gets as *cluster*; None for this
    process.
    """

    @wraps(command)
    def gathered(
        *args: object,
        executor: str | None,
        address: str | None,
        per_node: int | None,
        **others: object,
    ) -> object:
        return command(*args, cluster=_cluster(executor, address, per_node, None), **others)

    return _with(_EXECUTOR, gathered)


def _cluster(
    executor: str | None, address: str | None, per_node: int | None, limit: int | None
) -> RayCluster | None:
    if executor is None:
        if address is not None or per_node is not None:
            alone = "--per-node" if address is None else "--address"
            raise click.UsageError(f"{alone} needs --executor ray: add it, or remove {alone}")
        return None
    from shardkit.fleet.ray_cluster import executor_named

    return executor_named(executor, address=address, per_node=per_node, limit=limit)


def json_option(what: str) -> Callable[[Command], Command]:
    """--json, which prints *what*."""
    return click.option(
        "--json", "as_json", is_flag=True, help=f"Print {what} as one JSON document."
    )


limit_option = click.option(
    "--limit",
    "limits",
    metavar="NAME=VALUE",
    multiple=True,
    callback=parse_limits,
    shell_complete=completion.limits,
    help=(
        "Raise a safety limit. The error message names the limit to raise. Names: "
        f"{', '.join(_NAMES)}."
    ),
)

shard_size_option = click.option(
    "--max-shard",
    metavar="SIZE",
    default="5GB",
    show_default=True,
    callback=parse_shard_size,
    help="Largest file, header included, as in 2GB or 500MiB; none for a single shard.",
)

format_option = click.option(
    "--format",
    metavar="NAME",
    shell_complete=completion.formats,
    help="Read SRC as this format, instead of recognising it.",
)

quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")

root_option = click.option(
    "--root",
    metavar="PATH",
    help="Select the subtree at this dotted path; '.' for everything. By default the model is "
    "found.",
)

_EDITS = (
    root_option,
    click.option(
        "--include",
        metavar="GLOB",
        multiple=True,
        help="Select only names that match; repeatable. * also matches dots.",
    ),
    click.option(
        "--exclude", metavar="GLOB", multiple=True, help="Leave out names that match; repeatable."
    ),
    click.option(
        "--rename",
        metavar="REGEX=REPL",
        multiple=True,
        callback=parse_renames,
        help="Replace every match in every name; repeatable, in order. The first = after a valid "
        "REGEX separates the two.",
    ),
    click.option(
        "--dtype",
        metavar="TYPE",
        callback=parse_type,
        shell_complete=completion.types,
        help="Cast floats to bf16, fp16, fp32 ...; needs torch.",
    ),
    click.option(
        "--ties",
        type=click.Choice(["keep-first", "copy"]),
        default="keep-first",
        show_default=True,
        help="Write a tied weight once and record its other names, or write it under each name.",
    ),
)

part_option = click.option(
    "--part",
    metavar="K/N",
    callback=parse_part,
    help="Do only part K of N; other processes, on any machine, do the others. env takes the part "
    "from Slurm, Kubernetes or torchrun.",
)

_EXECUTOR = (
    click.option(
        "--executor",
        type=click.Choice(["ray"]),
        help="Have the work done by the machines of a Ray cluster; needs shardkit[ray].",
    ),
    click.option(
        "--address",
        metavar="ADDRESS",
        help="The cluster: auto for the one that runs on this machine. Default: RAY_ADDRESS, or a "
        "new one on this machine.",
    ),
    click.option(
        "--per-node",
        type=click.IntRange(min=1),
        metavar="N",
        help="Files that each machine of the cluster works on at a time; by default one more "
        "than it has processors.",
    ),
)

_WRITING = (
    click.option(
        "--jobs",
        type=click.IntRange(min=1),
        metavar="N",
        help="Files written in parallel; by default one more than there are processors, or as "
        "many as processors if compressed.",
    ),
    click.option(
        "--limit-rate",
        metavar="RATE",
        callback=parse_rate,
        help="Move at most so many bytes in a second, as in 500MB/s.",
    ),
    part_option,
    *_EXECUTOR,
    click.option(
        "--no-fsync",
        is_flag=True,
        help="Skip fsync. Faster, but the output may be lost on power failure.",
    ),
    click.option(
        "--checksum",
        type=click.Choice(["xxh3", "sha256"]),
        help="Write digests of every file and tensor to shardkit.manifest.json, and check the "
        "checksums of the source first.",
    ),
    click.option(
        "--compress",
        metavar="CODEC",
        shell_complete=completion.codecs,
        help="Compress the shards: zstd, in its seekable format, which is read in place; zstd -d "
        "decompresses them.",
    ),
    click.option("--dry-run", is_flag=True, help="Print the plan and write nothing."),
    click.option("--overwrite", is_flag=True, help="Replace an earlier output of shardkit."),
    click.option(
        "--no-companions",
        is_flag=True,
        help="Leave out the small files beside the weights: config, tokenizer, licence.",
    ),
    format_option,
    limit_option,
    json_option("what was done"),
    quiet_option,
)


def _with(options: Sequence[Option], command: Callable[..., object]) -> Callable[..., object]:
    """*command* with *options*, which stand in its help in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def _or_usage(parse: Callable[[str], Parsed], word: str) -> Parsed:
    try:
        return parse(word)
    except ShardkitError as error:
        raise click.BadParameter(
            f"{error}; {error.command_hint}" if error.command_hint else str(error)
        ) from None


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
