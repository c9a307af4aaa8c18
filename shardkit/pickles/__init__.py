"""The unpickler that executes nothing: a pickle becomes plain objects, and the tensors in it become
byte ranges.

The files of torch have had several forms. `shardkit.formats` has a module for each, and all of them
read their pickles here::

    until 0.1.9    a tar archive                         not read, but named
    until 1.5      five pickles, then the storages       formats.torch_legacy
    since 1.6      a zip archive: data.pkl, data/0, …    formats.torch_zip
    TorchScript    the same, with code and constants     formats.torch_script

The steps for a pickle::

    bytes ─ machine, opcodes ─→ objects ─ torch_globals ─→ tensors ─ walk ─→ named entries
"""
