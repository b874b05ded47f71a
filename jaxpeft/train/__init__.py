"""Training: losses, optimizer, train step, training loop and logging. No code here names a
method.
"""
