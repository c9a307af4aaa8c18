"""shardkit/sources/foreign."""
