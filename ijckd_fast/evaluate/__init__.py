"""What a trained net is worth: accuracy, agreement, and the bound on its error."""
