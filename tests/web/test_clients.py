"""Clients that are many, slow, broken or greedy, and what a server still answers to the others."""

import socket

from rococap.web.server import listen


def test_an_answer_does_not_wait_for_the_client_to_acknowledge_its_head():
    """Otherwise each takes 40 ms: TCP holds the body back until then."""
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
