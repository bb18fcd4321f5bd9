"""`python -m megatron_dynmix`, the same as the console script."""

import sys

from megatron_dynmix.cli import main

if __name__ == "__main__":  # saving a checkpoint starts processes that import this module
    sys.exit(main())
