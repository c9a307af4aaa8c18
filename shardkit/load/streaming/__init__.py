"""Blocks that are read ahead into bounded memory, and held for as long as a forward needs them.

The states of a page, which is what one block takes in the prefetch buffer::

    nowhere ── a forward needs it, or will ──→ reading ── last read done ──→ there ── claim ──→ held
       ↑                                          │ failed                     ↑                 │
       └──────────── evicted for another ─────────┴────────────────────────────┴──── release ────┘
"""
