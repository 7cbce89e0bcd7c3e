"""What an SAE is worth, on data it was not trained on."""
