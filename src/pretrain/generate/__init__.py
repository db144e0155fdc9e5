"""Weights -> text: generate tokens, or return the distribution of the next one.

`sampling` has the sampling parameters, generation of ids and of texts, and the next-token
distribution; `packing` stores a decoder's weights for fast generation on a CPU.
"""

from pretrain import make_callable

make_callable(__name__)
