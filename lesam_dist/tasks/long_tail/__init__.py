"""Classification of a long-tailed training set, with a balanced evaluation; one file for each way to learn it."""
