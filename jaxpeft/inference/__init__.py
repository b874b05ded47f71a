"""Using a trained model: loading it with its adapter, generating text, predicting labels."""
