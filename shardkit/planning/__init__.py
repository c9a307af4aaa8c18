"""shardkit/planning."""
