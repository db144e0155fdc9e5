"""Files -> documents -> filtered documents, without torch.

`files` lists the files of a source, detects their formats and decompresses them. `reading` reads
text and chooses the reader of a file: `records` (JSON), `tables` (CSV, Parquet, Arrow), `pages`
(HTML, WARC) or `publications` (PDF, books, mail, dumps). `filters`, `duplicates` and `overlap` find
the documents to remove, by the hashes of `words`. `documents` has the classes that all of them
share. The corpus that is installed with the package is in `bundled/`.
"""
