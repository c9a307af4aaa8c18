"""What shardkit needs from the machine: threads, forks, free memory, a progress bar. Nothing here
knows a checkpoint.
"""
