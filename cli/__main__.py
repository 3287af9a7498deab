"""The command line as `python -m lowvram_video.cli`, where the command `lowvram-video` is not installed."""

import sys

from .main import main

sys.exit(main())
