"""Tensors between particles: collectives of a peer group, buckets, compression.

Knows bytes and peers; must not know rules or DeepSpeed.
"""
