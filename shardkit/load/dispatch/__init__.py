"""shardkit/load/dispatch."""
