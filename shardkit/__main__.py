"""`python -m shardkit` is `shardkit`."""

from __future__ import annotations

from shardkit.cli import run

if __name__ == "__main__":
    run()
