"""shardkit/pickles."""
