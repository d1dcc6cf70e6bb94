"""The processes of one run, and BatchNorm over all of them."""
