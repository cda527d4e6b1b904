"""The command `rkd`."""
