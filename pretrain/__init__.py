"""Shards to a model: an encoder and a sparse MLM head on a DeepSpeed engine; the learning rate follows the clock."""
