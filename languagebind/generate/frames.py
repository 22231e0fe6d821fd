"""Cut a video into VIDAL's eight frames, and resize the clip."""

import subprocess
