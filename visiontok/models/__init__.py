"""Models that no installable library has, and the tiny trained ViT that ships with the package."""
