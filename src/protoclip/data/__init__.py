"""Image-text pairs, episodes over them, views and loaders."""
