"""Image-text pairs: sources, episodes, transforms and loading.

Data sets that models are judged on are in `evaluation/datasets.py`.
"""
