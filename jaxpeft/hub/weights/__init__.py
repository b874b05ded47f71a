"""Weight files: safetensors read and written by byte range, and their conversion to leaves."""
