"""Worker processes: claiming, reading, captioning and storing pictures, and supervising several such processes.

Knows the queue and the interface of the engines, but no model.
"""
