"""Image encoders from local folders: pictures in, tokens out."""
