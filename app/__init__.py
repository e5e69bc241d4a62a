"""The page in the browser. Not there yet: `launch.py` says what to run instead."""
