"""`python -m jaxrank` is the `jaxrank` command."""

import sys

from jaxrank.cli import main

sys.exit(main())
