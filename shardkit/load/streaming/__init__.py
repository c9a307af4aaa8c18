"""shardkit/load/streaming."""
