"""Where arrays are: the mesh of devices, and how a batch and a tree lie on it."""
