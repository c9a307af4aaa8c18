"""Fill a model from a checkpoint: match names, shapes and types first, read, and touch the model
last.
"""
