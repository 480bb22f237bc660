"""The event stores that ours is set beside, each in a process of its own and with the interpreter that it wants.

A peer reads orders from its standard input and answers with figures, one JSON object per line (`serving.py` for Python,
`emmett.mjs` for Node). Foldbus and the hand-written reference are served the same way: no variant shares a heap, a
garbage collector or an event loop with another. `install.py` puts the peers into `.cache/peers`, never into the
project's own environment.

Axon is left out: a JVM, Maven and a build of one's own are too much for a row. Where its JDBC engine was measured,
called directly and in rounds of its own, it did beside raw asyncpg: one event 1.67 (1 caller) and .75 to 1.03 (64),
1,000 events at once .34 of COPY and .38 to .55 of `unnest`, loading .44 (37 ms for 10,000), the whole log .21 to .27.
"""
