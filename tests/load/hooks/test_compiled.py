"""Models that stream and are compiled, by the compiler that torch takes by itself and by one that
any device has.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from accelerators import RUNNERS
from toys import IDS, loaded, logits, resident_on, saved, streamed, trained


@pytest.fixture(autouse=True)
def _compiler_starts_and_ends_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=RUNNERS)
def device(request: pytest.FixtureRequest) -> str:
    """What the model runs on."""
    runner: str = request.param
    return runner


@pytest.fixture(params=[pytest.param("inductor", marks=pytest.mark.slow), "eager"])
def backend(request: pytest.FixtureRequest, device: str) -> str:
    """A compiler for that device."""
    name: str = request.param
    try:
        torch.compile(lambda x: x + 1, backend=name)(torch.ones(2, device=device))
    except RuntimeError as error:  # what the compiler raises, whatever it misses
        pytest.skip(f"{name} compiles nothing for {device}: {str(error).splitlines()[0]}")
    return name


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_computes_what_the_resident_one_does(
    backend: str, device: str, tmp_path: Path
) -> None:
    model, same = loaded(saved(trained(), tmp_path), device, ring=2), resident_on(device)
    model.order = same.order = [0, 1]
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(IDS), logits(same), rtol=1e-4, atol=1e-4)
    assert streamed(model)
