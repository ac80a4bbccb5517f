"""`python -m apt_diffusion` is the command `apt-diffusion`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
