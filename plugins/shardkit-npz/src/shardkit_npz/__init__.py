"""NumPy's .npz and .npy as formats of shardkit."""
