"""How the operators run on a GPU: Triton kernels and their launches. Imported on first use only."""
