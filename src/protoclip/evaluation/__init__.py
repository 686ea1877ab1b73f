"""Evaluation: pure metric functions and the suite that runs them."""
