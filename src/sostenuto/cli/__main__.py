"""``python -m sostenuto.cli``."""

import sys

from sostenuto.cli import main

sys.exit(main())
