"""The reading site: pages generated from the source, with equations and code side by side."""
