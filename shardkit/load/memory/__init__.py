"""Where bytes go: memory that is made once, and large reads side by side that fill it."""
