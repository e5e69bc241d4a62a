"""The page in the browser, and what may be said on the command line."""
