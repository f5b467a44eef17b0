"""The generated Triton kernels on a GPU."""
