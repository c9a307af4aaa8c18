"""Lazy byte strings: the length is known before they are read, and only `chunks()` reads bytes.

::

    Extent            a run of bytes in a file
    Literal, Buffer   bytes that are in memory already
    Framed, Expanded  decompressed while it is read
    Concat            one payload after another
    Strided           a view on a storage, made contiguous
    Joined            a cat or a stack of tensors
    Cast              numbers of another type
    Swapped           the other byte order

`coalesce` merges adjacent payloads, `open_files` and `small_reads` open each file once, `digests`
computes digests of bytes while they are copied.
"""
