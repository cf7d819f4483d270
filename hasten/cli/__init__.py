"""The `hasten` command."""
