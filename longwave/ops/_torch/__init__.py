"""Portable kernels: blocks of torch operations that fit a cache, with gradients by hand. One file an op.

Conjugates are physical: inside a compiled custom op torch overlooks a lazy one.
"""
