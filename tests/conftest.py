"""What every test shares."""

import os
from pathlib import Path

import pytest
import torch

# two test processes share two cores: one thread each keeps them out of each other's way
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data, named by PETIOLE_DATA; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("PETIOLE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs real data: {folder} is absent, set PETIOLE_DATA")
    return folder
