"""Weights <-> other programs' formats: Hugging Face directories, GGUF, llama2.c.

`families` is the table of the names that other programs use for each family; `layouts` converts
tensors by it; `hf`, `gguf` and `llama2c` read and write the files and convert configs;
`importing` opens any of them. `verification` checks an export with another library, which
`verification_worker.py` loads in its own process. `modeling_pretrain.py` is shipped with the
weights that transformers has no class for.
"""
