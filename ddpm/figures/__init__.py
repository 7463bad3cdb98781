"""Images, plots and HTML pages."""
