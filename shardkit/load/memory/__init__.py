"""Memory for weights: allocated once, and filled by large parallel reads."""
