"""Knowing what a run needs before it runs: the step compiled ahead of time for devices that are not
there, and read.
"""
