"""`explain`: why each part of a model is where it is, and how long a forward takes, predicted and
measured.
"""
