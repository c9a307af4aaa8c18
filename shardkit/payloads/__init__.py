"""A weight is an address: a byte string whose length is known before it is read, and of which only
`chunks()` reads bytes.

::

    Extent            a run of bytes in a file
    Literal, Buffer   bytes that are in memory already
    Framed, Expanded  decompressed while it is read
    Concat            one payload after another
    Strided           a view on a storage, made contiguous
    Joined            a cat or a stack of tensors
    Cast              numbers of another type
    Swapped           the other byte order

`coalesce` joins payloads that touch, `open_files` and `small_reads` open each file once, `digests`
sums bytes as they pass.
"""
