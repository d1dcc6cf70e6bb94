"""Files to deploy a trained net with."""
