"""Quantized bases: selecting and quantizing kernels, also on a mesh, and computing with them."""
