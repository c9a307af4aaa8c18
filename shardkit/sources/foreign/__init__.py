"""What a path is that no format reads, and what to do with it: files and folders of other programs,
pieces of a file.
"""
