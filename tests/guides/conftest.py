"""Where these tests find what `make guides` is made of."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
