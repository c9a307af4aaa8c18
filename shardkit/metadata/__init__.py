"""The documents beside weights: headers, indexes, manifests and journals, parsed and dumped.
Nothing here opens a file.
"""
