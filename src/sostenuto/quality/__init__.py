"""Quality of images: distance to real ones, class accuracy, and fidelity to the uncached images from the same noise."""
