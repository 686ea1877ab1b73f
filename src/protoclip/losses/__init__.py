"""The losses, their weighted sum, and gradients of batches larger than memory."""
