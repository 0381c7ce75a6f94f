"""A connection to PostgreSQL on which nobody waits for ever for an answer. Needs the extra `postgres`."""

import math
import time
from typing import Any

import psycopg
from psycopg.abc import RV, PQGen


class ExpectingConnection(psycopg.Connection[Any]):
    """Closes itself, and raises psycopg's OperationalError, once a statement has had no answer for `silence_sec`.

    TCP notices a machine that does not answer, but not a server that is stuck behind a kernel, a proxy or a pooler that
    does.
    """

    silence_sec = math.inf

    def wait(self, gen: PQGen[RV], *args: Any, **options: Any) -> RV:
        return super().wait(self._answered(gen), *args, **options)

    def _answered(self, gen: PQGen[RV]) -> PQGen[RV]:
        """The same steps; psycopg is told ten times a second that nothing has come, and tells the generator."""
        heard = time.monotonic()
        try:
            step = next(gen)
            while True:
                ready = yield step
                if ready:
                    heard = time.monotonic()
                elif time.monotonic() - heard > self.silence_sec:
                    self.close()
                    raise psycopg.OperationalError("the server has not answered, although the connection stands")
                step = gen.send(ready)
        except StopIteration as ended:
            answer: RV = ended.value
            return answer
