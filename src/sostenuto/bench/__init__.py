"""The benchmark: methods and other libraries beside each other, on the same model, inputs and seeds."""
