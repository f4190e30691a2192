"""The sidecar: it holds money before a call, meters every chunk on its way, and settles after.

Read from the top: *wires* (`edge`, `upstream`, `identity`, `app`, `sim`, `cli`) move bytes; *decisions*
(`request`, `exchange`, `meter`, `aggregate`) say what happens; *values* (`sse`, `chunk`, `usage`, `tokens`,
`models`, `errors`) are what they speak of. Decisions and values do no I/O and read no clock.
"""
