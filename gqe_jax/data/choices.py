"""What can be chosen of data, and what is chosen unless said: the command line's help needs no more than this."""

SPLITS = ("train", "heldout")
PACKINGS = ("concat", "best-fit")
DEFAULT_PACKING = "concat"
DEFAULT_HELDOUT_FRACTION = 0.05
LONGEST_ROW = 2**24  # tokens; reading one takes some 300 MB then
