"""`python -m clipfast.train`."""

import sys

from clipfast.training.run import main

if __name__ == "__main__":
    sys.exit(main())
