"""Data: what lies in a folder of shards, in which order it is seen, and how it gets into a batch.

`shards` writes and reads tar files, `manifest` says what a folder of them holds, `order` says which sample comes when,
`windows` brings bytes from disk, `reader` turns them into tensors, `dataset` joins folders, `loader` makes micro-batches of
one rank. `bad` replaces samples that are damaged; `stores` and `cache` bring shards from object stores.
"""
