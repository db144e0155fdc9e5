"""Documents -> shards -> batches.

`preparation` turns a corpus into a folder of token ids by the `stages` of a job on disk (`jobs`),
`writer` writes such a folder and `format` reads it, `order` maps samples to windows, `mixed` joins
several sources, `trace` answers what a step read, and `batches` reads windows as tensors. Only
`batches` needs torch.
"""
