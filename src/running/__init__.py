"""How a script runs: several processes, signals, and a folder for itself.

The lessons use it, and it uses no lesson and no other room. Read it when a run takes hours.
"""
