"""Settings of every test."""

from __future__ import annotations

import os

from hypothesis import settings

# A busy machine makes no test wrong; what hangs is ended by pytest-timeout.
settings.register_profile("shardkit", deadline=None)
settings.load_profile("shardkit")

# What a test sees has the colours that the test asks for, whatever the terminal or the CI service asks for.
for name in ("NO_COLOR", "FORCE_COLOR"):
    os.environ.pop(name, None)
