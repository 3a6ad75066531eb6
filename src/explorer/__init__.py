"""The machinery of explore.py: pictures, parts switched off, and the networks that it shows.

Only explore.py uses it. Read it to build such a page; a learner does not need it.
"""
