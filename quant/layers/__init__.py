"""The quantised linear as a module, and folding."""
