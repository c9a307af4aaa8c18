"""Where the files that tests read lie."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TESTS = ROOT / "tests"
FIXTURES = ROOT / "fixtures"
GOOD = FIXTURES / "good"
