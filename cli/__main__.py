"""The command line, as `lowvram-video` and as `python -m lowvram_video.cli`."""

import sys

try:
    from .main import main
except KeyboardInterrupt:  # PyTorch takes seconds to load
    print("lowvram-video: interrupted", file=sys.stderr)
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
