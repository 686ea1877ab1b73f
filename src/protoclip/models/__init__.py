"""The towers, the projection heads, and the model that holds them.

Frozen models that only encode, as external teachers do, are in `encode/encoder.py`.
"""
