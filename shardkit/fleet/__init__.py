"""The units of work of a plan, done by threads, by the parts of a job array, or by a cluster::

    Plan ── one `Work` for each file ──► Executor ──► write_one ──► the file, and a record of it
                                         threads
                                         a part of a job array     by `Part`
                                                                          │
    OUT ◄── commit: every record there, last the files with digests ◄─────┘

All of them do the same units and leave the same records, so that one can finish what another has
begun.
"""
