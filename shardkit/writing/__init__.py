"""shardkit/writing."""
