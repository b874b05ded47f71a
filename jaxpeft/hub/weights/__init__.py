"""Weights in files: safetensors read and written by byte ranges, and the leaves that their tensors
make.
"""
