"""From a path to a `Checkpoint`: which file, which format, and an error for anything else.

::

    path ─ open ─┬ a file or an index ─ scanner ─→ registry.recognise ─→ Format.scan ─┐
                 └ a folder ─ candidates ─→ the model among its files ────────────────┴─→ Checkpoint
                            └ folder_contents, left_out ─→ what is copied, and what is left out

`foreign` identifies files that no format reads.
"""
