"""What this computer has -> what may run on it: devices, GPUs, what an engine is bound to.

Imports the ground words only. Does not know engines' weights, sequences or sockets; all but
`device.py` stays clear of torch. Read `device.py` first.
"""
