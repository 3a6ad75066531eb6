"""The machinery of practice.py: the exercises, the copies to edit, and the judge.

Only practice.py uses it. A learner should never read it: exercises.toml holds the hints. To see how
an answer is judged, read judge.py, then explaining.py.
"""
