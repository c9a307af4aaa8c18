"""shardkit/load/hooks."""
