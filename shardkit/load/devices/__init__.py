"""shardkit/load/devices."""
