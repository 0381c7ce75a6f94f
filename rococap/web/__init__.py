"""Pages that show the queue in a browser, and change it only as the commands do. Needs the extra `web`.

Knows no model. Reads rows through `queue` and `results`, and loads every file that it serves when it starts.
"""
