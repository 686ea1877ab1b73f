"""Projection heads: from tower outputs to the small space that K-means clusters.

Projections into the joint space belong to the towers, in `towers.py`.
"""

from torch import nn

from protoclip.config import HeadConfig


def projection_head(embed_dim: int, config: HeadConfig) -> nn.Sequential:
    """Linear - BatchNorm - ReLU, `hidden_layers` times, then Linear to `projection_dim`."""
    layers: list[nn.Module] = []
    width, hidden = embed_dim, config.hidden_dim
    for _ in range(config.hidden_layers):
        layers += [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        width = hidden
    layers.append(nn.Linear(width, config.projection_dim))
    return nn.Sequential(*layers)
