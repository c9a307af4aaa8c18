"""Forward hooks: weights in and out, inputs to where they are needed, models that take turns, and
what all that takes.
"""
