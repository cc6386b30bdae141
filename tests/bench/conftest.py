"""The benchmark is not installed: these tests import it from the checkout."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
