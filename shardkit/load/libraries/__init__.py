"""Models of Transformers and Diffusers: made without memory, loaded from their folders, and saved
as they save them.
"""
