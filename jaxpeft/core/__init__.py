"""The mechanism: tree paths, sites and targets, partition and combine, the interceptor, the
`Method` type.
"""
