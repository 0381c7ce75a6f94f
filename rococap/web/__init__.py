"""What a browser shows of a queue: its progress, its pictures and its captions."""
