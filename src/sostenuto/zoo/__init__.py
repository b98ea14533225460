"""Tiny networks of the classes that diffusers exports: for tests, examples and `sostenuto models --check`."""
