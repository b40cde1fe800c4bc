"""Holds the choices and defaults of `gqe prepare`, apart from the rest, so that its help loads quickly."""

SPLITS = ("train", "heldout")
PACKINGS = ("concat", "best-fit")
DEFAULT_PACKING = "concat"
DEFAULT_HELDOUT_FRACTION = 0.05
LONGEST_ROW = 2**24  # tokens; reading one takes some 300 MB then
