"""Packs: folders of compiled kernels, which run without a compiler.

`elf`, `record`, `format` and `driver` need the standard library and torch alone, and import relatively: they are copied into folders that
have to run where attngen is not installed.
"""
