"""A base whose kernels are quantized: which of them, made on the mesh, and merged into."""
