"""Settings of every test."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from hub import Hub

# Tests run side by side, and the threads of OpenMP would spin while they wait for work: they sleep.
# libgomp reads this when torch is imported, here and in the processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A busy machine makes no test wrong; what hangs is ended by pytest-timeout.
settings.register_profile("shardkit", deadline=None)
settings.load_profile("shardkit")

# What a test sees has the colours that the test asks for, whatever the terminal or the CI service
# asks for.
for name in ("NO_COLOR", "FORCE_COLOR"):
    os.environ.pop(name, None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("torch") and find_spec("torch") is None:
        pytest.skip("needs torch")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch computes in the calling thread alone, from the first test of the module that asks for
    it to the module's last.

    For tests that fork, because the threads of OpenMP do not exist in the child, and for models
    that are so small that several threads would only wait for each other. Threads that a test
    starts have as many as the environment says, and their results may differ in the last bit.
    """
    import torch

    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on loopback, which this process takes for the real one. It is empty, and so is the
    cache, in *tmp_path*/hub.
    """
    from hub import Hub

    client = pytest.importorskip("huggingface_hub", reason="it is what asks the Hub")
    remote_bytes = "shardkit.load.hub.remote_bytes"
    __import__(remote_bytes)
    monkeypatch.setattr(sys.modules[remote_bytes], "PAUSE", 0.001)
    with Hub() as started:
        constants = client.constants
        monkeypatch.setattr(constants, "ENDPOINT", started.endpoint)
        monkeypatch.setattr(client.hf_api.api, "endpoint", started.endpoint)
        template = f"{started.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield started
