"""Sharding: the device mesh, and the shardings of batches and trees."""
