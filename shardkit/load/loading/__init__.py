"""shardkit/load/loading."""
