"""The features of an episode, K-means, and prototypes in a student's space.

What is learned from prototypes is in `losses/prototypical.py`.
"""
