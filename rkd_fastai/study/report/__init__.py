"""The report of a study: `tables` and `plots` make its parts, and `page` writes them as files and as one HTML page."""
