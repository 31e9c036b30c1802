"""What the Triton kernels of all ops share. Nothing here is imported before the first call on a GPU."""
