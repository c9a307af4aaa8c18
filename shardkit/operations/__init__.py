"""The verbs of the library: convert, offload-prep, verify and diff, place. Each tells one story,
from arguments to a report.
"""
