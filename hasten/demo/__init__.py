"""A small language model that ships with Hasten, and what `make demo` shows of it."""
