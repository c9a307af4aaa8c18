"""A model that streams, under every fault: right answers or a clear error, no hang, and nothing
left behind.

Faults come from outside, as the system has them: calls that fail, files that change, signals,
memory that there is not.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import shardkit
from shardkit.errors import FormatError, ShardkitError
from shardkit.load import (
    close,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
)
from shardkit.load.streaming.page_layout import READERS

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and the paths of descriptors"),
    pytest.mark.timeout(300),
]

if sys.platform == "linux":
    import streamer
    from injection import LOADS, Layer, Strike, failing
    from interruption import interrupted

WIDTH = 24
LAYERS = 4  # a ring of two cannot hold them
X = torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH)


class Layers(nn.Sequential):
    """Blocks that say when they begin."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS))
        )
        self.before: Callable[[int], object] = lambda number: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self):
            self.before(number)
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def resident() -> Layers:
    torch.manual_seed(5)
    return Layers().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def expected(resident: Layers) -> torch.Tensor:
    y: torch.Tensor = resident(X)
    return y


@pytest.fixture
def folder(resident: Layers, tmp_path: Path) -> Path:
    return saved(resident, tmp_path / "folder")


def saved(model: Layers, folder: Path) -> Path:
    """*model* in a shard for each of its blocks."""
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for number, layer in enumerate(model):
        tensors = {f"{number}.{name}": tensor for name, tensor in layer.state_dict().items()}
        save_file(tensors, shard(folder, number))
        weight_map |= dict.fromkeys(tensors, shard(folder, number).name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def shard(folder: Path, number: int) -> Path:
    return folder / f"model-{number + 1:05}-of-{LAYERS:05}.safetensors"


def empty() -> Layers:
    with init_empty_weights():
        return Layers().eval()


def streaming(folder: Path, *, ring: int = 2) -> Layers:
    return load_checkpoint_and_dispatch(empty(), folder, {"": "disk"}, ring=ring)


def outcome(model: Layers, expected: torch.Tensor) -> str | None:
    """What a forward of *model* says is wrong; None where its answer is right, and a failure where
    that is wrong.
    """
    try:
        assert torch.equal(model(X), expected)
    except ShardkitError as error:
        return str(error)
    return None


def half_streaming(model: Layers, folder: Path) -> Layers:
    return load_checkpoint_and_dispatch(model, folder, {"": "disk", "1": "cpu"})


@contextlib.contextmanager
def struck(
    folder: Path, at: int | None, strike: Strike | None = None, *, lasting: bool = False
) -> Iterator[Layer]:
    """From here on the read number *at* below *folder* is struck."""
    layer = Layer(folder, at, strike, watched=LOADS, lasting=lasting)
    with layer.installed():
        yield layer


def nothing_left(model: nn.Module) -> None:
    """All weights are addresses again, which take no memory."""
    plain = {
        name
        for name, weight in model.state_dict(keep_vars=True).items()
        if type(weight) in (torch.Tensor, nn.Parameter)
    }
    assert not plain


# Files.


def turned_into_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


FAULTS: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "cut": lambda path: os.truncate(path, path.stat().st_size - 8),
    "cut in its header": lambda path: os.truncate(path, 20),
    "empty": lambda path: os.truncate(path, 0),
    "a pointer of git-lfs": lambda path: path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    ),
    "a folder": turned_into_a_folder,
}
CHANGES: dict[str, Callable[[Path], object]] = {
    **{name: FAULTS[name] for name in ("missing", "cut", "empty")},
    "replaced": lambda path: (
        path.with_name("new").write_bytes(bytes(path.stat().st_size)),
        path.with_name("new").rename(path),
    ),
    "written to": lambda path: path.write_bytes(path.read_bytes()[:-50] + b"\1" * 50),
}


@pytest.mark.parametrize(
    "load",
    [load_checkpoint_in_model, load_checkpoint_and_dispatch, lambda *args: streaming(args[1])],
)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_shard_is_told_by_name_when_the_model_is_loaded(
    fault: str, load: Callable[..., object], folder: Path
) -> None:
    FAULTS[fault](shard(folder, 3))
    model = empty()
    with pytest.raises(ShardkitError, match=shard(folder, 3).name):
        load(model, folder)
    assert all(weight.is_meta for weight in model.parameters())


@pytest.mark.parametrize("at", [0, 1, LAYERS - 1])
@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_changes_in_the_middle_of_a_forward_is_told_by_name(
    change: str, at: int, folder: Path, expected: torch.Tensor
) -> None:
    model, broken = streaming(folder), shard(folder, 2)
    model.before = lambda number: CHANGES[change](broken) if number == at else None
    sentence = outcome(model, expected)  # what was read before is right
    assert sentence is None or broken.name in sentence
    model.before = lambda number: None
    for _ in range(2):
        with pytest.raises(ShardkitError, match=broken.name):
            model(X)
    nothing_left(model)


def test_a_checkpoint_that_is_swapped_for_another_is_told_and_loads_anew(
    folder: Path, resident: Layers
) -> None:
    model = streaming(folder)
    model(X)
    better = copy.deepcopy(resident)
    better.get_parameter("1.0.weight").add_(1)
    saved(better, folder.with_name("better"))
    folder.rename(folder.with_name("old"))
    folder.with_name("better").rename(folder)
    with pytest.raises(ShardkitError, match=r"model-0000\d-of-00004\.safetensors"):
        model(X)
    assert torch.equal(streaming(folder)(X), better(X))


# Calls that fail.


@pytest.mark.parametrize(
    "number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE], ids=errno.errorcode.get
)
def test_a_load_that_fails_at_any_read_leaves_the_model_as_it_was(
    number: int, folder: Path
) -> None:
    for load in (load_checkpoint_in_model, half_streaming):
        for at in range(1000):
            model = empty()
            with (
                struck(folder, at, failing(number), lasting=True) as layer,
                contextlib.suppress(FormatError),
            ):
                load(model, folder)
            if layer.struck is None:
                break
            assert all(weight.is_meta for weight in model.parameters())
        assert at >= 5


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE], ids=errno.errorcode.get)
def test_a_forward_that_fails_at_any_read_is_told_and_the_next_is_right(
    number: int, tmp_path: Path
) -> None:
    sweep = streamer.struck(*streamer.saved(tmp_path), number)
    assert not sweep.faults, "\n".join(sweep.faults)
    assert sweep.left["told"] >= streamer.LAYERS
    assert sweep.left["not loaded"] > 2


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, SystemExit, KeyboardInterrupt])
def test_a_reader_that_dies_stops_no_forward_for_ever(
    error: type[BaseException], folder: Path, expected: torch.Tensor
) -> None:
    def dying(*_: object) -> None:
        raise error

    def stopped_or_right() -> None:
        with contextlib.suppress(error, ShardkitError):
            assert torch.equal(model(X), expected)

    model = streaming(folder)
    for at in range(2 * LAYERS):
        with struck(folder, at, dying):
            stopped_or_right()
        stopped_or_right()  # a read ahead that was under way may fail still
        assert torch.equal(model(X), expected)
    nothing_left(model)


def test_descriptors_that_run_out_are_told_and_the_next_forward_is_right(
    folder: Path, expected: torch.Tensor
) -> None:
    model = streaming(folder)
    assert torch.equal(model(X), expected)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with contextlib.suppress(ShardkitError):  # files may be open already
            for _ in range(3):
                assert torch.equal(model(X), expected)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for _ in range(3):
        assert torch.equal(model(X), expected)


# Interrupts.


@contextlib.contextmanager
def slow_reads(folder: Path, seconds: float) -> Iterator[None]:
    def late(call: object, real: Callable[[], object], args: tuple[object, ...]) -> None:
        time.sleep(seconds)

    with struck(folder, 0, late, lasting=True):
        yield


def test_an_interrupt_at_any_moment_ends_the_forward_and_no_other(
    folder: Path, expected: torch.Tensor
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    model = streaming(folder)
    old = signal.signal(signal.SIGUSR1, interrupt)
    watchers, gc.callbacks[:] = (
        gc.callbacks[:],
        [],
    )  # Hypothesis has one, and Python lets no interrupt out of it
    interrupted = 0
    try:
        with slow_reads(folder, 0.002):
            for step in range(60):
                timer = threading.Timer(0.0005 * step, os.kill, (os.getpid(), signal.SIGUSR1))
                try:
                    timer.start()
                    while timer.is_alive():
                        assert torch.equal(model(X), expected)
                    timer.join()
                    time.sleep(0.001)
                except KeyboardInterrupt:
                    interrupted += 1
                timer.join()
                assert torch.equal(model(X), expected)
    finally:
        gc.callbacks[:] = watchers
        signal.signal(signal.SIGUSR1, old)
    assert interrupted > 30
    close(model)
    nothing_left(model)


@pytest.mark.slow
def test_an_interrupt_between_any_two_calls_leaves_the_next_forward_right(
    folder: Path, expected: torch.Tensor
) -> None:
    model = streaming(folder)
    moment = 0
    while interrupted(lambda: model(X), moment):
        assert torch.equal(model(X), expected)
        moment += 3
    assert moment > 500
    close(model)
    nothing_left(model)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_what_one_thread_raises_is_no_other_threads_business(
    error: type[BaseException], folder: Path, expected: torch.Tensor
) -> None:
    model = streaming(folder)
    count = torch.get_num_threads()
    right: list[bool] = []
    raised: list[int] = []

    def run(fails: bool) -> None:
        torch.set_num_threads(count)  # a new thread has as many as the environment says
        for _ in range(60):
            if not fails:
                right.append(torch.equal(model(X), expected))
                continue
            try:
                model[3](model[2](X[:, :-1] if _ % 2 else X))
                raise error
            except (error, RuntimeError):
                raised.append(1)

    threads = [threading.Thread(target=run, args=(number % 2 == 0,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert (len(right), all(right), len(raised)) == (180, True, 180)
    gc.collect()
    nothing_left(model)


# Often, and many at once.


def threads_and_descriptors() -> tuple[int, int]:
    gc.collect()
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def resident_bytes() -> int:
    """Of memory that is not a file's: that of files comes and goes as the system likes."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return 1024 * next(
        int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")
    )


def settled(before: tuple[int, int]) -> bool:
    """Whether there are no more threads and descriptors than *before*, soon."""
    deadline = time.monotonic() + 200
    while threads_and_descriptors() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    return threads_and_descriptors() <= before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_eight_threads_give_eight_thousand_right_answers_on_a_ring_of_two(
    folder: Path, expected: torch.Tensor
) -> None:
    model = streaming(folder, ring=2)
    right: list[bool] = []
    threads = [
        threading.Thread(
            target=lambda: right.extend(torch.equal(model(X), expected) for _ in range(1000))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(800)
    assert (len(right), all(right)) == (8000, True)
    nothing_left(model)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_forwards_take_no_more_than_a_hundred(folder: Path, resident: Layers) -> None:
    begun, _ = threads_and_descriptors()
    model = streaming(folder)
    blocks, expected = list(model)[:3], nn.Sequential(*list(resident)[:3])(X)

    def forwards(count: int) -> None:
        for _ in range(count):
            y = X
            for block in blocks:
                y = block(y)
            assert torch.equal(y, expected)

    forwards(1000)
    _, before = threads_and_descriptors()
    memory = [resident_bytes()]
    for _ in range(9):
        forwards(1000)
        memory.append(resident_bytes())
    threads, descriptors = threads_and_descriptors()
    assert descriptors <= before
    assert threads <= begun + READERS  # which start when there is work for one more
    grown = sorted(after - before for before, after in pairwise(memory))
    assert grown[len(grown) // 2] < 64 << 10  # one lap may make room for more laps


@pytest.mark.slow
def test_fifty_models_are_loaded_and_closed_and_leave_nothing(
    folder: Path, expected: torch.Tensor
) -> None:
    before, memory = threads_and_descriptors(), 0
    for number in range(50):
        model = streaming(folder)
        assert torch.equal(model(X), expected)
        if number % 2:
            close(model)
        del model
        if number == 10:
            memory = resident_bytes()
    assert settled(before)
    assert resident_bytes() - memory < 4 << 20


def compressed(model: Layers, tmp_path: Path) -> Path:
    pytest.importorskip("zstandard")
    shardkit.offload_prep(saved(model, tmp_path / "plain"), tmp_path / "folder", compress="zstd")
    return tmp_path / "folder"


def turned(model: Layers, tmp_path: Path) -> Path:
    """As a checkpoint of weights that lie transposed in their storages."""
    (tmp_path / "folder").mkdir()
    torch.save(
        {name: weight.t().contiguous().t() for name, weight in model.state_dict().items()},
        tmp_path / "folder" / "m.pt",
    )
    return tmp_path / "folder" / "m.pt"


def of_doubles(model: Layers, tmp_path: Path) -> Path:
    return saved(copy.deepcopy(model).double(), tmp_path / "folder")


@pytest.mark.parametrize("stored", [compressed, turned, of_doubles])
def test_no_forward_but_the_first_opens_a_file(
    stored: Callable[[Layers, Path], Path], resident: Layers, expected: torch.Tensor, tmp_path: Path
) -> None:
    model = load_checkpoint_and_dispatch(
        empty(), stored(resident, tmp_path), {"": "disk"}, ring=2, dtype=torch.float32
    )
    assert torch.equal(model(X), expected)
    with struck(tmp_path / "folder", None) as layer:
        for _ in range(3):
            assert torch.equal(model(X), expected)
    assert {call.name for call in layer.calls} == {"preadv"}


# Processes.

# For processes that fork from any of their threads, or have no memory to start more:
# `torch.set_num_threads` is only for the thread that calls it.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

MODEL = """
import os, signal, sys, threading, time
from pathlib import Path
import torch
from torch import nn
folder, width, layers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
sys.path[:0] = sys.argv[4:]
from shardkit.errors import FormatError, LoadError
from shardkit.load import init_empty_weights, load_checkpoint_and_dispatch
from shardkit.load.lazy.paged import Paged
with init_empty_weights():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers)))
model = load_checkpoint_and_dispatch(model.eval(), folder, {"": "disk"}, ring=2)
x = torch.linspace(-1, 1, 3 * width).reshape(3, width)
"""

SLOW = """
from injection import Layer
def late(call, real, args):
    reading.set()
    time.sleep(0.3)
reading = threading.Event()
layer = Layer(folder, 0, late, watched=((os, "preadv", 0), (os, "pread", 0)), lasting=True)
slowness = layer.installed()
slowness.__enter__()
"""


def program(
    body: str, folder: Path, *, width: int = WIDTH, layers: int = LAYERS
) -> subprocess.CompletedProcess[str]:
    """Run *body* in a process of its own that has the model, and in which each thread computes
    alone.
    """
    tests = Path(__file__).parent.parent
    command = [
        sys.executable,
        "-c",
        MODEL + body,
        str(folder),
        str(width),
        str(layers),
        str(tests.parent),
        str(tests / "crash"),
    ]
    return subprocess.run(
        command, env=os.environ | ONE_THREAD, capture_output=True, text=True, timeout=250
    )


FORKS = """
right, last = model(x), model[3](x)

def in_child(work):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        code = work()
    finally:
        os._exit(code)

def forwards():
    return int(not all(torch.equal(model(x), right) for _ in range(5)))

def grandchild():
    return forwards() or in_child(forwards)

codes = []
threads = [threading.Thread(target=lambda: [model(x) for _ in range(200)], daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(10):
    codes.append(in_child(grandchild))
handle = model[2].register_forward_pre_hook(lambda *_: codes.append(in_child(lambda: int(not torch.equal(model[3](x), last)))))
codes.append(int(not torch.equal(model(x), right)))
handle.remove()
for thread in threads:
    thread.join()
codes.append(forwards())
assert len(codes) >= 13 and not any(codes), codes  # more where the other threads came by the hook, too
"""


def test_a_fork_at_any_moment_is_right_in_the_parent_the_child_and_its_child(folder: Path) -> None:
    done = program(FORKS, folder)
    assert done.returncode == 0, done.stderr


FORKS_WITHIN = """
right = model(x)
codes = []

def fork(block, *_):
    assert not isinstance(block.weight, Paged)
    codes.append(os.fork())

handle = model[2][0].register_forward_pre_hook(fork)
try:
    said = "right" if torch.equal(model(x), right) else "wrong"
except LoadError as error:
    said = str(error)
handle.remove()
if not codes[0]:
    in_child = "forked during a forward" in said and all(
        isinstance(weight, Paged) for weight in model.parameters()
    )
    os._exit(0 if in_child and torch.equal(model(x), right) else 1)
print(said, os.waitstatus_to_exitcode(os.waitpid(codes[0], 0)[1]))
"""


def test_a_forward_that_was_running_while_its_process_forked_raises_once_in_the_child(
    folder: Path,
) -> None:
    done = program(FORKS_WITHIN, folder)
    assert (done.returncode, done.stdout) == (0, "right 0\n"), done.stderr


EXITS = {
    "after a forward": "model(x)",
    "while another thread goes on": """
def forwards():
    right = model(x)
    for _ in range(2):
        assert torch.equal(model(x), right)
threading.Thread(target=forwards).start()
reading.wait()
""",
    "while another thread closes what a third one runs": """
from shardkit.load import close
def forwards():
    for _ in range(2):
        model(x)
def closing():
    reading.wait()
    close(model)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shardkit-stream")]
for work in (forwards, closing):
    threading.Thread(target=work).start()
reading.wait()
""",
    "while another thread loads and forwards": """
from shardkit.load import close
def late():
    threading.main_thread().join()
    for place in ("cpu", "disk"):
        with init_empty_weights():
            twin = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers)))
        twin = load_checkpoint_and_dispatch(twin.eval(), folder, {"": place}, ring=2)
        assert torch.equal(twin(x), model(x))
threading.Thread(target=late).start()
""",
    "by a close at the end": """
import atexit
from shardkit.load import close
atexit.register(close, model)
model(x)
""",
    "by SystemExit inside": "model[2].register_forward_pre_hook(lambda *_: sys.exit(0)); model(x)",
    "after an interrupt": """
model[1].register_forward_pre_hook(lambda *_: signal.raise_signal(signal.SIGINT))
try:
    model(x)
except KeyboardInterrupt:
    pass
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("last", EXITS)
def test_a_process_ends_with_reads_in_flight(last: str, folder: Path) -> None:
    if "another thread" in last and (3, 12) <= sys.version_info < (3, 12, 2):
        pytest.skip("this Python starts no thread once the main thread has ended")
    done = program(SLOW + EXITS[last], folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


NO_MEMORY = """
import resource
def limited(more):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + more, resource.RLIM_INFINITY))

block = 4 * width * width
for more in (block // 2, 3 * block // 2):
    limited(more)
    try:
        with torch.no_grad():
            model(x)
    except LoadError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
with torch.no_grad():
    assert torch.equal(model(x), torch.zeros(3, width))
"""


def test_memory_that_there_is_not_is_told_and_the_next_forward_is_right(tmp_path: Path) -> None:
    width = 6000
    with init_empty_weights():
        model = nn.Sequential(
            *(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(3))
        )
    entries, at = {}, 0
    for name, weight in model.state_dict().items():
        entries[name] = {
            "dtype": "F32",
            "shape": list(weight.shape),
            "data_offsets": [at, at + 4 * weight.numel()],
        }
        at += 4 * weight.numel()
    header = json.dumps(entries).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + at)
    done = program(NO_MEMORY, path, width=width, layers=3)
    assert done.returncode == 0, done.stderr
    assert "of weights: Cannot allocate memory" in done.stdout
