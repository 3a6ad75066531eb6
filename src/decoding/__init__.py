"""How text comes out of a network: the cache of keys and values, beam search, sampling.

The lessons from transformer.py on use it; it uses attention.py. Chapters 4 to 6 explain it.
"""
