"""Every test runs with one thread a process, and with shapes and types checked at run time."""

import jaxtyping

# Before anything of the package is imported.
jaxtyping.install_import_hook("protoclip", "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
