"""Where the modules beside this one, which also run as programs, find each other and what other tests make."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
