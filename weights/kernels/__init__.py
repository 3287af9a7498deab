"""Kernels that unpack stored weights, behind operators of torch; files of kernels need Triton, the operators do not."""
