"""Plan a run: compile its train step ahead of time for absent devices, and analyze the program."""
