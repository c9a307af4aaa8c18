"""shardkit/payloads."""
