"""The throughput of this machine, and the time of a forward: measured bandwidth → predicted
seconds.
"""
