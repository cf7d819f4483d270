"""`python -m hasten` is the `hasten` command."""

import sys

from hasten.cli.__main__ import main

sys.exit(main())
