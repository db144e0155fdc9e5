"""`python -m pretrain` is the command `pretrain`: same arguments, same exit codes.

It exists for environments where the command is not on the PATH. It refuses nothing itself.
"""

from __future__ import annotations

import sys

from pretrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
