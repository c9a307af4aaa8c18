"""What a checkpoint is, as names, types, shapes and byte ranges, and the changes that are made to
it. Everything here is pure.

::

    Checkpoint ─ model_root ─→ the model in it ─ edits ─→ the entries that are written
                                                            ├ blocks ─→ the blocks that run as one
                                                            └ device_fit ─→ the device of each
"""
