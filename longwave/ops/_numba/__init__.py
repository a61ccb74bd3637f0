"""CPU kernels in Numba, float32, over one small SIMD layer: one file an op. The only folder that imports numba.

Kernels take flat arrays and check nothing: the op that calls them has checked shapes, dtypes and devices.
"""
