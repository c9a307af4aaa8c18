"""shardkit/load/diagnostics."""
