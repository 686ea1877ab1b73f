"""Features of frozen models: encoding pairs once, keeping what came of it, and teachers.

Features of evaluation data are in `evaluation/features.py`, those to cluster in
`prototypes/features.py`.
"""
