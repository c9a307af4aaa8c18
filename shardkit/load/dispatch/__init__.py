"""Attach a model to what it streams from: the functions of Accelerate, and how they are carried
out.
"""
