"""The built-in formats, found through the same entry points as any plugin's."""
