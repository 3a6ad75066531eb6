"""How text comes out of a network, or a small file: cache, beam search, sampling, talks, coder.

The lessons from transformer.py on use it; it uses attention.py. Chapters 4 to 6 explain it.
"""
