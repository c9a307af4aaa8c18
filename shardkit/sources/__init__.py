"""From a path to a `Checkpoint`: which file, which format, and a sentence for what is none.

::

    path ─ open ─┬ a file or an index ─ scanner ─→ registry.recognise ─→ Format.scan ─┐
                 └ a folder ─ candidates ─→ the model among its files ────────────────┴─→ Checkpoint
                            └ folder_contents, left_out ─→ what is copied, and what is left out

`foreign` names what no format reads.
"""
