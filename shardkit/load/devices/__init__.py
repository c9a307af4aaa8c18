"""Devices: how much each may hold, memory that they copy out of, and the transfers to them."""
