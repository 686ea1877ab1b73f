"""Image-text pairs: sources, episodes, transforms and loading."""
