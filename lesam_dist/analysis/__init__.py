"""What the loss looks like around the weights of a checkpoint: how sharp it is, in which sense, and how we know.

Each analysis is a command, `lesam-dist analyze NAME`, and a function here, of an `Objective` that `load` makes of a
checkpoint, or that is made of any model and images.
"""
