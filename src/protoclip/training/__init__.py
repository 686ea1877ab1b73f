"""Episodic training: stages, schedules, state and the loop."""
