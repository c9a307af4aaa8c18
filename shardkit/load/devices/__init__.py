"""Devices: their budgets, pinned memory, and the transfers to them."""
