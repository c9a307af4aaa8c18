"""Plan the files that hold digests of others: offload.json, then shardkit.manifest.json. Pure.

They are written last, and their content is made from what was written before them. Their length is
planned: digests of one algorithm are all of one length.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from shardkit.metadata import manifest, offload_index
from shardkit.metadata.manifest import MANIFEST_NAME, Digests, Listed, Manifest
from shardkit.metadata.offload_index import OFFLOAD_NAME, OffloadRecord
from shardkit.metadata.unit_records import Finished
from shardkit.payloads.digests import new_hash
from shardkit.planning.plan import Late, OutputFile, Plan

_Written = Mapping[str, Finished]


def with_digest_files(plan: Plan, checksum: str | None) -> Plan:
    """*plan* with an offload.json, if it has blocks, and a manifest by the algorithm *checksum*."""
    plan = replace(plan, checksum=checksum)
    if plan.record is not None:
        plan = _with_file(plan, OFFLOAD_NAME, partial(_offload_index, plan.record, plan.shards))
    if checksum is not None:
        plan = _with_file(plan, MANIFEST_NAME, partial(_manifest, checksum, plan))
    return plan


def _with_file(plan: Plan, name: str, make: Callable[[_Written], bytes]) -> Plan:
    late = Late(len(make(_as_planned(plan))), make)
    return replace(plan, files=(*plan.files, OutputFile(name, (), late=late)))


def _offload_index(record: OffloadRecord, shards: Sequence[OutputFile], written: _Written) -> bytes:
    digests = {file.expanded: _digests(written[file.name]).blocks for file in shards}
    return offload_index.dump(record, digests)


def _manifest(algorithm: str, plan: Plan, written: _Written) -> bytes:
    """The manifest of all files of *plan*, which does not have the manifest itself."""
    finished = ((file, written[file.name]) for file in plan.files)
    listed = (
        Listed(file.name, each.nbytes, plan.tensors_in(file), _digests(each))
        for file, each in finished
    )
    return manifest.dump(Manifest(algorithm, tuple(listed)))


def _digests(finished: Finished) -> Digests:
    assert finished.digests is not None, "every file that another one describes is summed"
    return finished.digests


def _as_planned(plan: Plan) -> dict[str, Finished]:
    """What *plan* writes, with digests of the right length."""
    whole = _blank(plan.checksum) if plan.checksum else ""
    block = _blank(plan.record.algorithm) if plan.record else ""
    tensors: defaultdict[str, str] = defaultdict(lambda: whole)
    return {
        file.name: Finished(
            file.nbytes, Digests(whole, tensors, (block,) * len(plan.blocks_in(file)))
        )
        for file in plan.files
    }


def _blank(algorithm: str) -> str:
    return "0" * len(new_hash(algorithm).hexdigest())
