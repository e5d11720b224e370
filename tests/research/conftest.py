"""What these tests need besides packages: no network, and the other tests' checkpoints."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of jaxrank's own: few programs, each compiled once for all tests."""
    return dict(compile_cache=tmp_path_factory.mktemp("compiled"), row_tokens=256)
