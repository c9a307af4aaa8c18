"""Settings of every test."""

from __future__ import annotations

from hypothesis import settings

# A busy machine makes no test wrong; what hangs is ended by pytest-timeout.
settings.register_profile("shardkit", deadline=None)
settings.load_profile("shardkit")
