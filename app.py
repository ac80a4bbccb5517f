#!/usr/bin/env python
"""The studio in the browser, from a checkout: the same as `apt-diffusion studio`.

python app.py
python app.py --help
"""

from apt_diffusion.studio.command import main

if __name__ == "__main__":
    main()
