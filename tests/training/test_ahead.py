"""Reading ahead of the model."""

import itertools
import threading

import pytest
from steps import until

from rococap.errors import DatasetError
from rococap.training.ahead import BATCHES, Ahead


def test_everything_comes_in_order_and_no_more_than_a_few_batches_ahead():
    taken = []
    ahead = Ahead(number for number in range(50) if not taken.append(number))
    assert next(ahead) == 0
    until(lambda: len(taken) == BATCHES + 2, "it reads until the places are full, and holds one more")
    threading.Event().wait(0.3)
    assert len(taken) == BATCHES + 2
    assert list(ahead) == list(range(1, 50))
    assert list(ahead) == []


def test_an_error_arrives_where_the_batch_would_have():
    def source():
        yield 1
        raise DatasetError("the disk is gone")

    ahead = Ahead(source())
    assert next(ahead) == 1
    with pytest.raises(DatasetError, match="the disk is gone"):
        next(ahead)
    assert list(ahead) == []


def test_closing_ends_the_thread_although_nobody_takes_what_it_has():
    before = set(threading.enumerate())
    ahead = Ahead(itertools.count())
    next(ahead)
    ahead.close()
    assert set(threading.enumerate()) <= before  # of an earlier test, some may have ended
    assert list(ahead) == []
