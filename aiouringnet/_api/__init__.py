"""The public functions: each takes the loop first, then what the loop's method of that name takes.

call.py decides between our transports and the loop's own implementation;
connector.py puts our I/O beneath asyncio's code; the others are families of
loop methods.
"""
