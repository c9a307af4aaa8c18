"""shardkit/load/libraries."""
