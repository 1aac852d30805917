"""Data: the contents of folders of shards, the order in which they are drawn, and how they get into batches.

`shards` reads and writes tar files, `manifest` describes a folder of them, `order` says which sample comes when, `windows` reads bytes from
disk, `reader` makes tensors of them, `dataset` joins folders, and `loader` makes the micro-batches of one rank. `bad` replaces damaged
samples; `stores` and `cache` fetch shards from object stores.
"""
