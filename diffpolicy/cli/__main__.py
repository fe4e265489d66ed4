"""`python -m diffpolicy.cli` is `diffpolicy`."""

import sys

from diffpolicy.cli import main

sys.exit(main())
