"""All tests import the project from here, so that none of them has to say where it lies."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
