"""The commands of `lesam-dist analyze`, a file each: arguments, files, tables and figures around the functions."""
