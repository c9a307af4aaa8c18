"""shardkit/operations."""
