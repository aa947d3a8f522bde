"""One model from several experts: searches the coefficients with which their weights are added.

Knows tensors and files of models; must not know DeepSpeed, process groups or shards.
"""
