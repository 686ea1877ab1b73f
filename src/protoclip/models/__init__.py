"""The towers, the projection heads, and the model that holds them."""
