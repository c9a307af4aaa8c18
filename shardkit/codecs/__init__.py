"""The built-in codecs, found through the same entry points as any plugin's."""
