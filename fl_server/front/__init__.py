"""Between sockets and Django: one event loop that waits for slow clients, and threads that work for quick ones.

`app.py` is the ASGI application. A request's head, a small body and a long-poll cost a coroutine; a thread is
used from the moment when there is something to do until the answer is known. Django stays synchronous.
docs/explanation/decisions/one-loop-in-front.md says why.
"""
