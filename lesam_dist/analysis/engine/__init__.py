"""What the measures stand on: the loss of all images, its products, random vectors, files and what is kept of them."""
