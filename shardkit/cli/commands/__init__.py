"""shardkit/cli/commands."""
