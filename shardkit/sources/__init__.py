"""shardkit/sources."""
