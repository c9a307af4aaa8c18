"""shardkit/metadata."""
