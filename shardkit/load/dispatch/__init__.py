"""Attach a model to its stream of weights: the functions of Accelerate, and what is behind them."""
