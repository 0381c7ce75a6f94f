"""A worker process: what it holds, fetches, captions and stores, and what supervises several of them."""
