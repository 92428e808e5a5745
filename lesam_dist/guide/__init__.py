"""What helps one find the way: the first screen, recipes, methods, completion in the shell. None of it needs torch."""
