"""Documents -> shards -> batches.

`preparation` turns a corpus into a folder of token ids by the `stages` of a job on disk (`jobs`),
`writer` writes such a folder and `format` reads it, or several as one, `order` maps samples to
windows and back to steps, and `batches` reads windows as tensors. Only `batches` needs torch.
"""
