"""Fill a model from a checkpoint: match names, shapes and types, read, and modify it last."""
