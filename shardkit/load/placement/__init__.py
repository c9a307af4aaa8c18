"""shardkit/load/placement."""
