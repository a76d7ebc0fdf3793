"""``python -m vlmlab.cli`` is the console command ``vlmlab``."""

import sys

from vlmlab.cli.main import main

sys.exit(main())
