"""Execute: a `Plan` becomes files, complete or not at all.

`transaction` lists the states of an output on disk, and resumes from each that an interrupted run
may leave. `writer` writes the files of a plan, each by `copier` or, where it is compressed, by
`compress`. `reference_check` opens what was written.
"""
