"""Data: what lies in a folder of shards, in which order it is seen, and how it gets into a batch.

`shards` writes and reads tar files, `manifest` says what a folder of them holds, `order` says which sample comes when,
`windows` brings bytes from disk, `dataset` turns them into tensors, `loader` into micro-batches of one rank.
"""
