"""Pictures and recordings that were sent, decoded in processes of their own."""
