"""The reading site: pages that are made from the source, with equation and code side by side."""
