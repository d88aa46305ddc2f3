"""placeholder while the kernels are written"""
