"""How good the samples are: features of images, and statistics to compare them with."""
