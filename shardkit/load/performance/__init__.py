"""shardkit/load/performance."""
