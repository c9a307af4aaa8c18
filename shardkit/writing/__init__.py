"""Do: a `Plan` becomes files, complete or not at all.

`transaction` draws the states of an output on disk, and takes up each that a killed run may leave.
`writer` writes the files of a plan, each by `copier` or, where it is compressed, by `compress`.
`reference_check` opens what was written.
"""
