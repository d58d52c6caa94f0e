"""A hub of one's own: repositories in a directory, served to the stock huggingface_hub client."""
