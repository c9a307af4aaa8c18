"""shardkit/load/modules."""
