"""Fine-tuning: adapts a run's model to the original captions, and leaves a folder that captions like any other model.

Pictures come from the queue's rows by the same reader, and go through the same engine's `prepare`, as in captioning, so
that training sees what inference sees. Only `cli` and `demo` import this package.
"""
