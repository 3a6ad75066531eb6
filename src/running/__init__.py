"""How a script runs: options, errors and files; several processes, and signals.

The lessons from transformer.py on use it, and it uses no lesson and no other room. Read shell.py
before you write a script of your own, and processes.py when a run takes hours.
"""
