"""``python -m lightning_da3``."""

import sys

from lightning_da3.cli import main

sys.exit(main())
