"""Decide: entries become a `Plan`, in which every output file is a list of byte ranges. Nothing is
written.

`prepare` combines all steps; `plan` cuts files by size or by block, `frames` cuts compressed ones,
`companions` adds the small files of the source, and `output_path` decides where the output goes and
what it may replace.
"""
