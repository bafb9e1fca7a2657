"""Finding the joints of a model, testing a swap on numbers, swapping, undoing."""
