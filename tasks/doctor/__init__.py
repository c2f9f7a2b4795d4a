"""Checks of a machine and of the servers around it, for `neg doctor`."""
