"""Job kinds: one module or package each. The client side of a kind imports no training library."""
