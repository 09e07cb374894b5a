"""`python -m thinwire_lab` is `thinwire lab`."""

import sys

from thinwire_lab.cli import main

sys.exit(main())
