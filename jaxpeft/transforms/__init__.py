"""Pure functions from parameter trees to parameter trees: what `core` does for one method, checked
against all methods.
"""
