"""The toolkit of every page: one HTML file each, figures as inline SVG."""
