"""``python -m eafo_dynamic``: the command line."""

from eafo_dynamic.cli import main

raise SystemExit(main())
