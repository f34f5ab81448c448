"""`python -m jsurgery`, which a bare checkout understands too."""

import sys

from jsurgery.cli import main

sys.exit(main())
