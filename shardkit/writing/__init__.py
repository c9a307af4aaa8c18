"""Do: a `Plan` becomes files, whole or not at all.

The states of an output on disk, of which a run that was killed leaves one, and the next run takes up each::

    1  OUT              OUT.partial/ is not there               nothing has begun
    2  OUT              OUT.partial/journal, some files         being written; complete files are on record
    3  OUT              OUT.partial/journal, all files          every file is written, synced and checked
    4  OUT.partial/ and OUT have exchanged names, or OUT lies in OUT.partial/ (systems that cannot exchange)
    5  new OUT          OUT.partial/ holds the old one          being cleared
    6  new OUT          OUT.partial/ is gone                    done
"""
