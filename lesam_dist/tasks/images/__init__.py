"""What tasks on images share: where the images are and who reads them, the network, and how batches are mixed."""
