"""Inspect an `nn.Module`: its weights, its blocks, their sizes, and what torch does to it."""
