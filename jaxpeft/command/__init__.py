"""What the commands share: their arguments, their help, and how they report errors."""
