"""Several runs that belong together: methods compared, one field swept, and what is reported of them."""
