"""The losses, their weighted sum, and gradients of batches larger than memory.

Clustering is in `prototypes/`, and the optimizer steps in `training/trainer.py`.
"""
