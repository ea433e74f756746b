"""``python -m lightning_da3``."""

import sys

from lightning_da3.command import main

sys.exit(main())
