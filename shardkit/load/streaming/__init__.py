"""Blocks that are read ahead into memory of bounded size, and stay there for as long as a forward
borrows them. The threads of a model borrow them from `prefetcher`; `owner` has their state::

    hooks ── borrow, release ──→ prefetcher ── messages ──→ owner ── reads ──→ reader_pool
      ↑                                                       │ slots            │
      │                                                   ring_buffer            │
      └──────── the reader that completes a read wakes the thread that waits ────┘

    absent ── borrowed or expected ──→ reading ── last job done ──→ ready
      ↑                                   │ failed                    │
      └────────── evicted ────────────────┴── nobody borrows it ──────┘
"""
