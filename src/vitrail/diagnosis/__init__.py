"""What is wrong with the images of a dataset: `doctor`."""
