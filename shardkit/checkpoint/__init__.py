"""shardkit/checkpoint."""
