"""The command `languagebind index`, in which each depth map takes 10 ms longer, so that it can be killed midway."""

import time
from unittest import mock

from languagebind.config import run
from languagebind.index import main
from languagebind.modalities.depth import Depth

decode = Depth.decode


def slowly(self, source):
    time.sleep(0.01)
    return decode(self, source)


if __name__ == "__main__":
    with mock.patch.object(Depth, "decode", slowly):
        run(main)
