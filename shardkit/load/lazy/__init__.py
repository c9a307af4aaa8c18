"""Lazy tensors: they have a shape, a type and a device, and their bytes are read when they are
used.

::

    Paged             a tensor whose bytes are in a file; so are most views of it (lazy_view)
      └ Streamed      a parameter of a streaming model outside its block's forward
           │ written to
           ↓
         Backing      memory of its own, shared with its views
"""
