"""Units of work on a cluster of Ray (https://docs.ray.io), one task for each.

A task runs where a slot is free. It is tried again, on another slot, where the system refused to
write or the process or the machine died. What is wrong with a source is final. The output is in a
folder that all machines see under the same path.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from shardkit.errors import PlanError, ShardkitError
from shardkit.events import Event, OnEvent
from shardkit.hints import option
from shardkit.printable import shown
from shardkit.system.rate_limit import RateLimit
from shardkit.system.threads import TOGETHER
from shardkit.writing.writer import Done, Means, Work, attempt, unwritten

Item = TypeVar("Item")
Result = TypeVar("Result")

_ATTEMPTS = 6  # of one unit
_LOOK = 2.0  # seconds after which machines that came or went are noticed


@dataclass(frozen=True, slots=True)
class RayCluster:
    """The machines of a Ray cluster, which write the files of an output, one task for each.

    The output is in a folder that all machines see under the same path. A task is tried again, on
    another machine, where the system refused to write or the process or the machine died; what is
    wrong with a source is final. Needs ``pip install 'shardkit[ray]'``.

    Attributes:
        address: of the cluster, as ``"auto"`` for the one that runs on this machine; None for
            RAY_ADDRESS, or a new one on this machine. A connection that the program has already is
            used.
        per_node: tasks at a time on each machine; None for one more than it has processors, at most
            8.
        limit: bytes that each task moves in a second at most.

    Example:
        >>> import shardkit
        >>> cluster = shardkit.RayCluster("auto", per_node=4)
        >>> shardkit.convert("model.safetensors", "out", executor=cluster)  # doctest: +SKIP
    """

    address: str | None = None
    per_node: int | None = None
    limit: int | None = None

    def __call__(self, work: Sequence[Work], on_event: OnEvent) -> Iterator[Done]:
        by_name = {unit.file.name: unit for unit in work}
        for unit in work:
            on_event(Event("started", unit.file.name, unit.file.nbytes))
        tasks = [(unit, self.limit) for unit in work]
        for (unit, _), result in each_on(self, _write, tasks, lambda task: task[0].file.name):
            if isinstance(result, OSError):
                raise unwritten(unit, result)
            nbytes = by_name[result.name].file.nbytes
            on_event(Event("written", result.name, nbytes))
            on_event(Event("finished", result.name, nbytes))
            yield result


def each_on(
    cluster: RayCluster,
    function: Callable[[Item], Result],
    items: Sequence[Item],
    name_of: Callable[[Item], str],
) -> Iterator[tuple[Item, Result | OSError]]:
    """Call *function* for each of *items*, and yield what it returns as it ends; an OSError
    where every attempt raised one.

    Args:
        cluster: whose processes call it.
        function: of a module that the machines have.
        items: they pickle.
        name_of: what messages call one.

    Raises:
        ShardkitError: what a call raised; the cluster is out of reach; an item ended too many
            processes.
    """
    with connected(cluster):
        yield from _Run(_ray(), cluster.per_node, function, name_of).results(items)


@contextlib.contextmanager
def connected(cluster: RayCluster) -> Iterator[int]:
    """Connect to *cluster*, for as long as the block runs; gives its number of slots.

    Raises:
        ShardkitError: Ray is not installed, or the cluster is out of reach.
    """
    ray = _ray()
    if ray.is_initialized():
        yield sum(slots for _, _, slots in _nodes(ray, cluster.per_node))
        return
    address = cluster.address or os.environ.get("RAY_ADDRESS") or "local"
    quiet = {"include_dashboard": False} if address == "local" else {}
    try:
        try:
            _refuse_silent(address)
            with _own_signals():
                ray.init(address=address, log_to_driver=False, logging_level="ERROR", **quiet)
        except (OSError, RuntimeError, ValueError) as error:
            why = str(error).partition("\n")[0]
            raise ShardkitError(
                f"there is no cluster of Ray at {shown(address)}: {shown(why)}",
                hint="start one with `ray start --head`, or leave the address out for a cluster on "
                "this machine alone",
            ) from None
        yield sum(slots for _, _, slots in _nodes(ray, cluster.per_node))
    finally:
        ray.shutdown()


def executor_named(
    name: str,
    *,
    address: str | None = None,
    per_node: int | None = None,
    limit: int | None = None,
) -> RayCluster:
    """The executor called *name*; the other arguments are those of `RayCluster`.

    Raises:
        PlanError: there is none.
    """
    if name != "ray":
        raise PlanError(
            f"there is no executor {shown(name)}",
            hint=("the only one is ", option("executor", "ray")),
        )
    return RayCluster(address, per_node, limit)


def refuse_part(part: str | None) -> None:
    """Refuse a part beside an executor.

    Raises:
        PlanError: there is one.
    """
    if part is not None:
        raise PlanError(
            "an executor does all parts",
            hint=("leave out ", option("part"), " or ", option("executor")),
        )


class _Run:
    """One pass over items: which task runs on which machine."""

    def __init__(
        self,
        ray: Any,
        per_node: int | None,
        function: Callable[..., Any],
        name_of: Callable[[Any], str],
    ) -> None:
        self._ray = ray
        self._per_node = per_node
        self._remote = ray.remote(function)
        self._name_of = name_of
        self._running: dict[Any, tuple[str, Any]] = {}  # machine and item, by task
        self._attempts: Counter[str] = Counter()
        self._nodes: list[tuple[str, float, int]] = []
        self._look_at = 0.0

    def results(self, items: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        waiting = deque(items)
        with _own_interrupts(), contextlib.ExitStack() as ending:
            ending.callback(self._end)
            while waiting or self._running:
                self._start(waiting)
                ended, _ = self._ray.wait(list(self._running), num_returns=1, timeout=_LOOK)
                for task in ended:
                    _, item = self._running.pop(task)
                    result = self._result(task, item)
                    if result is None:
                        waiting.append(item)
                    else:
                        yield item, result

    def _end(self) -> None:
        """End the tasks that still run, and hear what they say, which Ray would print otherwise."""
        tasks = list(self._running)
        for task in tasks:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.cancel(task, force=True)
        for task in (
            self._ray.wait(tasks, num_returns=len(tasks), timeout=_LOOK)[0] if tasks else ()
        ):
            with contextlib.suppress(Exception):  # what ended the run is what has to be said
                self._ray.get(task)

    def _start(self, waiting: deque[Any]) -> None:
        """Start tasks where slots are free."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        used = Counter(node for node, _ in self._running.values())
        if time.monotonic() >= self._look_at:  # to ask takes a while
            self._nodes = list(_nodes(self._ray, self._per_node))
            self._look_at = time.monotonic() + _LOOK
        for node, processors, slots in self._nodes:
            for _ in range(slots - used[node]):
                if not waiting:
                    return
                item = waiting.popleft()
                self._attempts[self._name_of(item)] += 1
                task = self._remote.options(
                    num_cpus=min(1.0, processors / slots),
                    max_retries=0,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True),
                ).remote(item)
                self._running[task] = (node, item)

    def _result(self, task: Any, item: Any) -> Any:
        """What *task* gave; None where it is to be tried again."""
        errors = self._ray.exceptions
        name = self._name_of(item)
        is_last = self._attempts[name] >= _ATTEMPTS
        try:
            return self._ray.get(task)
        except errors.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, BaseException) else error
            if isinstance(cause, OSError):
                return cause if is_last else None
            if isinstance(cause, ShardkitError):
                raise cause from None
            raise ShardkitError(
                f"{shown(name)} failed on a machine of the cluster: {type(cause).__name__}: "
                f"{shown(str(cause))}",
                hint="install the same version of shardkit, and of its plugins, on all machines",
            ) from None
        except errors.RayError as error:  # the process or the machine died
            if is_last:
                raise ShardkitError(
                    f"{shown(name)} ended {_ATTEMPTS} processes of the cluster, the last by "
                    f"{type(error).__name__}",
                    hint="look at the memory of the machines, and at the logs of Ray",
                ) from None
            return None


def _nodes(ray: Any, per_node: int | None) -> Iterator[tuple[str, float, int]]:
    """The machines that are there, with their processors and slots."""
    for node in ray.nodes():
        processors = node["Resources"].get("CPU", 0.0)
        if node["Alive"] and processors:
            slots = per_node or min(TOGETHER, int(processors) + 1)
            yield node["NodeID"], processors, slots


def _write(task: tuple[Work, int | None]) -> Done:
    """Do one unit, in a process of the cluster."""
    unit, limit = task
    with Means.alone(unit.folder, RateLimit(limit) if limit else None) as means:
        return attempt(unit, means)


def _refuse_silent(address: str) -> None:
    """Raise an OSError where nobody listens at *address*, on which Ray insists for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and "/" not in address and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_LOOK).close()


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep what the process does when it is asked to end, which Ray replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # Ray's own way to end, where the signal comes meanwhile
        signal.signal(signal.SIGTERM, before)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _own_interrupts() -> Iterator[None]:
    """Raise Ctrl-C and SIGTERM as what they are, which come out of Ray as the cause of another
    error.
    """
    try:
        yield
    except SystemError as error:
        cause = error.__cause__
        if cause is not None and not isinstance(cause, Exception):
            raise cause from None
        raise


def _ray() -> Any:  # ray has no types that mypy takes without it
    try:
        import ray
        import ray.exceptions
    except ModuleNotFoundError:
        raise ShardkitError(
            "Ray is not installed", hint="install it with `pip install 'shardkit[ray]'`"
        ) from None
    return ray
