"""Tensors that are addresses: they have a shape, a type and a device, and their bytes are read when they are used.

::

    Paged             a tensor whose bytes are in a file; most views of it are Paged again (lazy_view, lazy_ops)
      └ Streamed      the same in a model that streams: what a parameter is outside its block's forward
           │ written to
           ↓
         Backing      memory of its own, shared with its views
"""
