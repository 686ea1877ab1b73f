"""Towers, projection heads and the model that holds them."""
