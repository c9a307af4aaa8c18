"""Print the sets of dependencies that pyproject.toml implies but does not list, for pip.

``python .ci/requirements.py oldest`` prints the lower bounds, ``core`` all but torch.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
PROJECT = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
NEEDS_TORCH = ("shardkit[", "torch")  # the extras that dev includes all bring torch
CHECKS_ONLY = ("mypy", "ruff", "types-")  # no test needs these


def oldest() -> list[str]:
    """Return what shardkit depends on, and the libraries it works with, at the lower bounds."""
    extras = PROJECT["optional-dependencies"]
    wanted = (
        PROJECT["dependencies"] + extras["transformers"] + extras["diffusers"] + extras["peers"]
    )
    pins = [re.sub(r">=([\d.]+).*", r"==\1", name) for name in wanted if "[" not in name]
    return list(dict.fromkeys(pins))


def core() -> list[str]:
    """Return what shardkit and its tests need, without torch and what brings it."""
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    return [name for name in wanted if not name.startswith(NEEDS_TORCH + CHECKS_ONLY)]


if __name__ == "__main__":
    print("\n".join({"oldest": oldest, "core": core}[sys.argv[1]]()))
