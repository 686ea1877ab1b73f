"""The features of an episode, K-means, and prototypes in a student's space."""
