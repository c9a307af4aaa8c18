"""The operations of the library: convert, offload-prep, verify, diff and place, from arguments to a
report.
"""
