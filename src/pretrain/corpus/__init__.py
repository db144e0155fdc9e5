"""Files -> documents -> filtered documents, without torch.

`files` lists the files of a source, detects their formats and decompresses them. `records` reads
JSON lines, JSON, CSV and Parquet, `reading` text, HTML and WARC, and chooses the reader. `filters`,
`duplicates` and `overlap` find the documents to remove, by the hashes of `words`. `documents` has
the classes that all of them share. The corpus that is installed with the package is in `bundled/`.
"""
