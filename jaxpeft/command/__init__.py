"""Shared code of the commands: arguments, help and error reporting."""
