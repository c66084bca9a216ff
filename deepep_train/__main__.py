"""`python -m deepep_train doctor | bench | plan`."""

import sys

from deepep_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
