"""shardkit/system."""
