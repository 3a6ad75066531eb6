"""How a script runs: options, errors and files; settings, long runs, and several processes.

The lessons from transformer.py on use it, and it uses no lesson and no other room. Read shell.py
before you write a script of your own, and runs.py when one takes hours.
"""
