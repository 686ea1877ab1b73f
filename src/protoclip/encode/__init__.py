"""Features of frozen models: encoding pairs once, keeping what came of it, and teachers.

Features to cluster are in `prototypes/features.py`.
"""
