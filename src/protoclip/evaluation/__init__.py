"""Evaluation: pure metric functions and the suite that runs them.

When a run is evaluated is decided in `training/run.py`; pages and figures come from `results/`.
"""
