"""Which class each class is taken for where labels are wrong in a way that people would get them wrong."""

from __future__ import annotations

from collections.abc import Sequence

CIFAR10_PAIRS = {"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"}
"""As in Patrini et al. (2017), "Making Deep Neural Networks Robust to Label Noise", and since."""

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SUPERCLASSES = (  # of CIFAR-100, each in the order of its labels
    ("beaver", "dolphin", "otter", "seal", "whale"),
    ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    ("orchid", "poppy", "rose", "sunflower", "tulip"),
    ("bottle", "bowl", "can", "cup", "plate"),
    ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    ("clock", "keyboard", "lamp", "telephone", "television"),
    ("bed", "chair", "couch", "table", "wardrobe"),
    ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    ("bear", "leopard", "lion", "tiger", "wolf"),
    ("bridge", "castle", "house", "road", "skyscraper"),
    ("cloud", "forest", "mountain", "plain", "sea"),
    ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    ("fox", "porcupine", "possum", "raccoon", "skunk"),
    ("crab", "lobster", "snail", "spider", "worm"),
    ("baby", "boy", "girl", "man", "woman"),
    ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
)


def taken_for(classes: Sequence[str]) -> dict[int, int]:
    """The label that each label is changed to, by label; one that is never changed is not in it.

    The names decide, whatever the images are stored as: CIFAR-10's classes by `CIFAR10_PAIRS`, CIFAR-100's by the next
    class of the same superclass, the last by the first; any others by the next class, the last by the first.

    Args:
        classes: names in label order, at least two.
    """
    if tuple(classes) == _CIFAR10:
        names = CIFAR10_PAIRS
    elif sorted(classes) == sorted(name for group in _SUPERCLASSES for name in group):
        names = {name: group[(i + 1) % len(group)] for group in _SUPERCLASSES for i, name in enumerate(group)}
    else:
        return {label: (label + 1) % len(classes) for label in range(len(classes))}
    label_of = {name: label for label, name in enumerate(classes)}
    return {label_of[name]: label_of[other] for name, other in names.items()}
