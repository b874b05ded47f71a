"""The mechanism: tree paths, target modules, partition and combine, the interceptor, and the
`Method` type.
"""
