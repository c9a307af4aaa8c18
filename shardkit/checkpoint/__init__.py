"""What a checkpoint is, as names, types, shapes and addresses, and the changes that are made to it.
Everything here is pure.

::

    Checkpoint ─ model_root ─→ the model in it ─ edits ─→ the entries that are written
                                                            ├ blocks ─→ what runs as one
                                                            └ device_fit ─→ where it goes
"""
