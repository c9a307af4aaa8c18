"""How fast this machine is, and how long a forward takes: measured bandwidth → predicted
seconds.
"""
