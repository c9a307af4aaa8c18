"""`explain`: why each part of a model is where it is, and what a forward takes, predicted beside
measured.
"""
