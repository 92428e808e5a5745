"""Domain generalisation: training on some domains, testing on others."""
