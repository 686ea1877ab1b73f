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
    (example,) = doctest.DocTestFinder(recurse=False).find(
        function,
        name,
        globs={
            **{public: getattr(protoclip, public) for public in protoclip.__all__},
            "LossWeights": LossWeights,
            "torch": torch,
        },
    )
    assert example.examples
    results = doctest.DocTestRunner().run(example)
    assert results.failed == 0
