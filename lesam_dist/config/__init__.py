"""What a run is told: the schema of a config, its checks, the command line, recipes. Imports no torch."""
