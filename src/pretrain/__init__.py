"""Pre-train a decoder-only Transformer on any text, and show what it learned.

Every number is a pure function of (seed, step, global sample). The rooms of the package lie side by
side in the order of the data: corpus, tokenizer, data, model, optimizer, checkpoint, generate,
evaluate, train, report; `cli` opens them from the command line. Importing this module loads none.
"""

from __future__ import annotations

__all__ = ["__version__"]

# The one place of the version: the build reads this line (pyproject.toml, tool.hatch.version).
__version__ = "0.1.0"
