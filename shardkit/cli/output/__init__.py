"""shardkit/cli/output."""
