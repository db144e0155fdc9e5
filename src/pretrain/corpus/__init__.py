"""Files -> documents -> filtered documents, without torch.

`files` lists the files of a source and detects their formats; `streams` decompresses them.
`records` reads JSON lines, JSON, CSV and Parquet, `web` HTML and WARC; `reading` chooses the reader
and reads text. `filters`, `duplicates` and `overlap` find the documents to remove, by the hashes of
`words`. `documents` has the classes that all of them share. The corpus that is installed with the
package is in `bundled/`.
"""
