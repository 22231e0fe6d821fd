"""The check of `test_memory.py` with the other video decoders. Only `scripts/test_media.sh` runs it."""

import pytest
from test_memory import check_growth, shards  # noqa: F401


@pytest.mark.parametrize("backend", ["decord", "pyav", "opencv"])
def test_the_loader_holds_as_much_after_many_clips_as_after_a_few(backend, shards, tmp_path):  # noqa: F811
    check_growth(backend, shards, tmp_path)
