"""Projection heads: from tower outputs to the small space where grouping happens."""

from torch import nn


def projection_head(
    *, embed_dim: int, hidden_dim: int, hidden_layers: int, projection_dim: int
) -> nn.Sequential:
    """Linear - BatchNorm - ReLU, `hidden_layers` times, then Linear to `projection_dim`.

    With no hidden layer the head is linear.
    """
    layers: list[nn.Module] = []
    width = embed_dim
    for _ in range(hidden_layers):
        layers += [nn.Linear(width, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True)]
        width = hidden_dim
    layers.append(nn.Linear(width, projection_dim))
    return nn.Sequential(*layers)
