"""Models by name from the Hub of Hugging Face: which files a model consists of, and their download
into the cache that all libraries share.

    name, revision ──▶ Repository ──▶ commit ──▶ the files of the commit
                                                   │ choose
                                                   ▼
    a folder of the cache ◀── fetch ◀── Download (what the cache has not)

A download goes on where an earlier one ended, even after a kill: see `partial_file`.
"""
