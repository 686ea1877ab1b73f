"""The examples in the docstrings of the public functions run."""

import doctest

import pytest
import torch

import protoclip
from protoclip.losses.objective import LossWeights


@pytest.mark.parametrize(
    "name", ["back_translate", "info_nce", "kmeans", "objective", "prototypical_loss"]
)
def test_examples_run(name: str) -> None:
    function = getattr(protoclip, name)
    names = {public: getattr(protoclip, public) for public in protoclip.__all__}
    names |= {"LossWeights": LossWeights, "torch": torch}
    (example,) = doctest.DocTestFinder(recurse=False).find(function, name, globs=names)
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
