"""shardkit/load/memory."""
