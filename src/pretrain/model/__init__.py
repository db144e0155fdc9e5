"""Ids -> hidden states -> loss, on one device and without files.

`families` has the axes of the architecture, the families and the published sizes; `config` the
settings, and counts parameters and FLOP. `decoder` is the model, `layers` the parts of a block,
`ngrams` the tables of the family `fast`, `dropout` reproducible dropout masks, `fused` faster forms
of small functions. `loss` is the training loss.

The capital letters at the end of a tensor's name are its shape: B rows, T positions, S cached and
new positions, D model width, H heads, K key/value heads, E head width, F feed-forward width, V
vocabulary, N = B T, P columns with padding or parts of an embedding, X any leading dimensions.
"""
