import pytest
from helpers import SHARED, write_shards


@pytest.fixture(scope="session")
def golden():
    """The original's outputs for real clips; skips where they are not at hand."""
    if not (SHARED / "golden").is_dir():
        pytest.skip(f"the original's outputs are not at {SHARED / 'golden'}")
    return SHARED


@pytest.fixture(scope="session")
def depth_shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), [24, 24, 24, 24])
