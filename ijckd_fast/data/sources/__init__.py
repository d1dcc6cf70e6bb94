"""Where images come from: what a data folder holds, listed without opening an image."""
