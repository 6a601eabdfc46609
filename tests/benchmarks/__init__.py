"""What a call costs: this library and its peers on the same work. See `__main__.py`."""
