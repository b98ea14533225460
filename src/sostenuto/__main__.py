"""``python -m sostenuto``: the command line."""

import sys

from sostenuto.cli import main

sys.exit(main())
