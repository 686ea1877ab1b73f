"""Image-text pairs: sources, episodes, transforms and loading.

Data sets that models are evaluated on are in `evaluation/datasets.py`.
"""
