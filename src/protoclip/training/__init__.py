"""Episodic training: stages, schedules, state and the loop.

The model is in `models/`, what it minimises in `losses/`, and how it is evaluated in `evaluation/`.
"""
