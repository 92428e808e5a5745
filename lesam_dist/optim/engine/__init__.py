"""What no method's author needs to open: the order of passes, the weights, the base optimizer, the backends."""
