"""Ranks that train as one: collectives, DDP and FSDP2, and the processor cores of a rank.

Which samples a rank reads is decided in `data/loader.py` and `data/sampler.py`.
"""
