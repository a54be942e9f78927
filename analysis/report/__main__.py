"""The door of ``python -m analysis.report``."""

import sys

from analysis.report.command import main

sys.exit(main())
