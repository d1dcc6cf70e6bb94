"""The commands of `ijckd-fast`, a file each."""
