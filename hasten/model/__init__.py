"""A tower with its weights, ready to run: values, not modules, so that nobody's `state_dict` learns of them."""

from hasten.model.context import Context, Dense, Store
from hasten.model.transformer import Transformer

__all__ = ["Context", "Dense", "Store", "Transformer"]

from hasten.model import native_stack as native_stack  # noqa: E402, I001 -- registers
