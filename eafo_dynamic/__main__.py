"""``python -m eafo_dynamic``: the command line."""

import sys

from eafo_dynamic.cli import main

sys.argv[0] = "eafo-dynamic"  # the name that help texts show
raise SystemExit(main())
