"""shardkit/load/lazy."""
