"""Training: losses, the optimizer, the step, the loop and its reports. Nothing here knows a method
by name.
"""
