"""`python -m pixnerd_kernels.cli`, the same as `pixnerd`."""

import sys

from pixnerd_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
