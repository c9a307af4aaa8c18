"""Forward hooks: load and release weights, move inputs, let models share a device by turns, and
measure forwards.
"""
