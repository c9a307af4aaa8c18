"""Blocks that are read ahead into memory of bounded size, and stay there for as long as a forward
borrows them. `prefetcher` owns their state; the threads of a model post messages to it::

    hooks ── borrow, release ──→ prefetcher ── reads by priority ──→ reader_pool
      ↑                            │  reserves slots: ring_buffer       │
      └───── the reader that completes a read wakes who waits ──────────┘

    absent ── borrowed or expected ──→ reading ── last job done ──→ ready
      ↑                                   │ failed                    │
      └────────── evicted ────────────────┴── nobody borrows it ──────┘
"""
