"""The processes of a run: which there are, how they join, agree and stop, and the arrays that they
share.
"""
