"""`python -m shardkit` is `shardkit`."""

from __future__ import annotations

import sys

from shardkit.cli import main

if __name__ == "__main__":
    sys.exit(main())
